"""Placing experts by their load."""

import json

import numpy as np
import pytest

from model.config import ModelConfig
from model.placement import Placement
from tools.place_experts import excess, main, place


@pytest.mark.parametrize(("experts", "ranks"), [(256, 4), (8, 3), (5, 5), (6, 1)])
def test_work_is_even_and_every_rank_gets_its_number_of_experts(experts, ranks):
    counts = np.random.default_rng(1).zipf(1.5, experts).clip(max=2000).tolist()
    rank_of = place(counts, ranks)
    held = [rank_of.count(rank) for rank in range(ranks)]
    assert sum(held) == experts
    assert max(held) - min(held) <= 1
    even = Placement.even(experts, ranks).ranks_of(0)
    assert excess(counts, rank_of, ranks) <= excess(counts, even, ranks)
    if experts == 256:
        assert excess(counts, rank_of, ranks) < 1.05 < excess(counts, even, ranks)


def test_counts_of_several_nodes_become_a_file_that_a_node_reads(tiny_checkpoint, tmp_path, capsys):
    config = ModelConfig.load(tiny_checkpoint)
    layers = np.random.default_rng(2).integers(0, 99, (2, config.num_hidden_layers, config.n_routed_experts))
    sources = []
    for number, counts in enumerate(layers):
        sources.append(str(tmp_path / f"node{number}.json"))
        (tmp_path / f"node{number}.json").write_text(json.dumps({"layers": counts.tolist()}))
    out = tmp_path / "placement.json"
    assert main([*sources, "--ranks", "2", "--out", str(out)]) == 0
    placement = Placement.load(out, config, 2)
    summed = layers.sum(0)
    for layer in range(config.num_hidden_layers):
        assert placement.ranks_of(layer) == tuple(place(summed[layer].tolist(), 2))
    assert "equal runs -> placed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "ranks", "words"),
    [
        ({"layers": []}, "2", "no counts yet"),
        ({"layers": [[1, 2]]}, "3", "there are 2 experts"),
        ({"layer": []}, "2", "layers"),
    ],
)
def test_what_cannot_be_placed_is_refused(tmp_path, capsys, content, ranks, words):
    source = tmp_path / "counts.json"
    source.write_text(json.dumps(content))
    assert main([str(source), "--ranks", ranks, "--out", str(tmp_path / "out.json")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
