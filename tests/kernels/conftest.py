"""Kernel tests run on the GPU where there is one, else in Triton's interpreter, which must be chosen before import."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator(request: pytest.FixtureRequest, device: torch.device) -> torch.Generator:
    """Random numbers that depend on the test's name alone."""
    seed = sum(ord(letter) * (place + 1) for place, letter in enumerate(request.node.name))
    return torch.Generator(device).manual_seed(seed)
