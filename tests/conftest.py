"""Fixtures that several packages share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released format with random weights, made by the tool that makes the newcomer's one."""
    from tools.make_checkpoint import make_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-v4"
    make_checkpoint(directory, preset="tiny", seed=0)
    return directory
