"""The largest steps run over one page and one slot, whatever the lengths."""

from itertools import pairwise

import pytest
import torch

from engine.activations import probe_batch, run_largest_steps
from engine.arena import Arena, Field
from engine.config import EngineConfig
from engine.decode_graphs import DecodeGraphs, auto_sizes, auto_widths, no_capture
from engine.dummy_weights import load_dummy_weights
from model.presets import tiny
from model.state_layout import build_state_layout
from model.transformer import Transformer

LAYOUT = build_state_layout(tiny(), row_format="fp8", index_format="mxfp4", page_tokens=32)


@pytest.mark.parametrize(("requests", "tokens"), [(1, 1), (1, 50), (4, 4), (3, 40)])
def test_a_probe_ends_at_the_length_and_names_every_token_once(requests, tokens):
    batch = probe_batch(LAYOUT, requests, tokens, 300, torch.device("cpu"))
    assert batch.query_start.tolist()[0] == 0
    assert batch.query_start.tolist()[-1] == tokens == len(batch.positions)
    last = batch.logits_rows
    assert batch.positions[last].tolist() == [299] * requests
    assert batch.token_request[last].tolist() == list(range(requests))
    assert batch.page_table.shape == (requests, -(-300 // 32))
    assert batch.one_token_each == (requests == tokens)


def test_the_largest_steps_run_on_the_real_model():
    model = Transformer(tiny(), numerics="released")
    load_dummy_weights(model, tiny(), seed=0)
    config = EngineConfig(model="", max_num_seqs=5, max_num_batched_tokens=40, block_size=32)
    run_largest_steps(model, LAYOUT, config, length=600)


def test_sizes_to_capture_reach_the_bound_and_waste_little():
    assert auto_sizes(1) == (1,)
    assert auto_sizes(3) == (1, 2, 3)
    sizes = auto_sizes(512)
    assert sizes[0] == 1
    assert sizes[-1] == 512
    assert all(b - a <= 64 and b <= 2 * a for a, b in pairwise(sizes))
    assert auto_widths(10) == (10,)
    assert auto_widths(64) == (64,)
    assert auto_widths(4096) == (64, 256, 1024, 4096)


def test_a_batch_gets_the_smallest_captured_shape_that_holds_it():
    graphs = DecodeGraphs((4, 1, 16), (64, 8), no_capture)
    assert graphs.shape_for(1, 8) == (1, 8)
    assert graphs.shape_for(2, 9) == (4, 64)
    assert graphs.shape_for(16, 64) == (16, 64)
    assert graphs.shape_for(17, 1) is None
    assert graphs.shape_for(1, 65) is None


def test_an_arena_gives_a_shape_the_same_place_every_time_and_refuses_what_is_too_large():
    arena = Arena(1024, torch.device("cpu"))
    fields = [Field(torch.int64, (5,)), Field(torch.int32, (3, 4))]
    places = []
    for value in (1, 2):
        arrays, tensors = arena.lay_out(fields)
        arrays[0][:] = value
        arrays[1][:] = 10 * value
        arena.send()
        assert tensors[0].tolist() == [value] * 5
        assert tensors[1].tolist() == [[10 * value] * 4] * 3
        places.append([tensor.data_ptr() for tensor in tensors])
    assert places[0] == places[1]
    assert all(place % 64 == places[0][0] % 64 for place in places[0])
    with pytest.raises(ValueError, match="of an arena of 1024"):
        arena.lay_out([Field(torch.int64, (129,))])
