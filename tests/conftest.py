"""Fixtures that several packages share."""

from pathlib import Path

import pytest

from tools import make_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released format with random weights, made by the tool that makes the newcomer's one."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-v4"
    assert make_checkpoint.main(["--preset", "tiny", "--out", str(directory), "--seed", "0", "--quiet"]) == 0
    return directory
