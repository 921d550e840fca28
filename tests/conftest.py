"""Fixtures that several packages share."""

from pathlib import Path

import msgspec
import pytest
import torch

from model.presets import tiny
from tools import make_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the released format with random weights, made by the tool that makes the newcomer's one."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-v4"
    assert make_checkpoint.main(["--preset", "tiny", "--out", str(directory), "--seed", "0", "--quiet"]) == 0
    return directory


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint cut down to four layers, one at least of every kind, hashed and scored: for tests of what
    happens between processes, whose steps take two thirds of the time."""
    directory = tmp_path_factory.mktemp("four-layers") / "tiny-v4"
    config = msgspec.structs.replace(tiny(), num_hidden_layers=4, compress_ratios=(0, 4, 16, 4, 0), num_hash_layers=2)
    make_checkpoint.make_checkpoint(directory, config, seed=0, max_shard_bytes=1 << 20, progress=False)
    return directory


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu, or gpu(n), exist only where there are so many, those marked interpreter where there is none."""
    gpus = torch.cuda.device_count()
    absent = [item for item in items if _needs(item) > gpus or (gpus and item.get_closest_marker("interpreter"))]
    config.hook.pytest_deselected(items=absent)
    gone = set(absent)
    items[:] = [item for item in items if item not in gone]


def _needs(item: pytest.Item) -> int:
    """How many GPUs."""
    marker = item.get_closest_marker("gpu")
    return 0 if marker is None else (marker.args or (1,))[0]
