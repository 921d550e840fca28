"""Fixtures that several packages share."""

from pathlib import Path

import pytest
import torch

from tools import make_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released format with random weights, made by the tool that makes the newcomer's one."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-v4"
    assert make_checkpoint.main(["--preset", "tiny", "--out", str(directory), "--seed", "0", "--quiet"]) == 0
    return directory


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu exist only where there is one, those marked interpreter only where there is none."""
    other = "interpreter" if torch.cuda.is_available() else "gpu"
    absent = [item for item in items if item.get_closest_marker(other)]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if not item.get_closest_marker(other)]
