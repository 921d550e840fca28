"""Kernel tests run on the GPU where there is one, else in Triton's interpreter, which must be chosen before import."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _interpreter_that_remembers() -> None:
    """At every call of a device function Triton's interpreter looks for builtins among all that triton.language has,
    in a quarter of the time of these tests. Their names never change: it looks once."""
    if torch.cuda.is_available():
        return
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            if core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator(request: pytest.FixtureRequest, device: torch.device) -> torch.Generator:
    """Random numbers that depend on the test's name alone."""
    seed = sum(ord(letter) * (place + 1) for place, letter in enumerate(request.node.name))
    return torch.Generator(device).manual_seed(seed)
