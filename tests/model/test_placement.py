"""Experts anywhere: every expert has one place, ranks hold runs of places, and files that cannot be are refused."""

import json

import pytest

from model.config import ModelConfig
from model.placement import ExpertShare, LayerShare, Placement
from runtime.errors import ConfigError
from tests.model.helpers import small_config


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return small_config()


@pytest.mark.parametrize(("experts", "size"), [(8, 2), (8, 3), (256, 4), (5, 5), (7, 1)])
def test_equal_runs_leave_no_gap(experts, size):
    placement = Placement.even(experts, size)
    shares = [placement.share(rank).layer(3) for rank in range(size)]
    assert [expert for share in shares for expert in share.experts] == list(range(experts))
    assert all(share.first == share.experts[0] and share.places is None for share in shares)
    assert max(map(len, (share.experts for share in shares))) - min(len(share.experts) for share in shares) <= 1
    assert [placement.ranks_of(0).count(rank) for rank in range(size)] == [len(share.experts) for share in shares]


def test_a_file_places_single_layers(config, tmp_path):
    path = tmp_path / "placement.json"
    path.write_text(json.dumps({"ranks": 2, "layers": {"1": [1, 0, 1, 1, 1, 0, 1, 1]}}))
    placement = Placement.load(path, config, 2)
    assert placement.ranks_of(1) == (1, 0, 1, 1, 1, 0, 1, 1)
    assert placement.ranks_of(0) == (0, 0, 0, 0, 1, 1, 1, 1)
    places = (2, 0, 3, 4, 5, 1, 6, 7)
    assert placement.share(0).layer(1) == LayerShare(0, (1, 5), places)
    assert placement.share(1).layer(1) == LayerShare(2, (0, 2, 3, 4, 6, 7), places)
    assert placement.share(1).layer(0) == ExpertShare(range(4, 8)).layer(0)


EIGHT = [0, 1] * 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"ranks": 4, "layers": {}}, "ranks=4, but 2 ranks share the experts"),
        ({"ranks": 2, "layers": {"99": EIGHT}}, "layers.99: the model has layers 0.."),
        ({"ranks": 2, "layers": {"0": EIGHT[:7]}}, "layers.0: places 7 of 8 experts"),
        ({"ranks": 2, "layers": {"0": [*EIGHT[:7], 2]}}, "layers.0: expert 7 is on rank 2, but there are ranks 0..1"),
        ({"ranks": 2, "layers": {"0": [0] * 8}}, "layers.0: rank 1 holds no expert"),
        ({"ranks": 2, "layers": {"0": [0.5] * 8}}, "layers"),
        ({"ranks": 2, "layers": {}, "layer": 1}, "unknown field `layer`"),
        ("no JSON", "placement.json"),
    ],
)
def test_files_that_cannot_be_are_refused_by_name(config, tmp_path, content, words):
    path = tmp_path / "placement.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        Placement.load(path, config, 2)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_file_that_is_not_there_is_named(config, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        Placement.load(tmp_path / "none.json", config, 2)
