"""Attention sublayers of the tiny model through all kernels at once, against the twins, with identical inputs."""

from __future__ import annotations

import contextlib

import pytest
import torch

from engine.dummy_weights import load_dummy_weights
from kernels.activations import Activations
from kernels.dispatch import forced_triton
from model.context import ForwardContext
from model.presets import tiny
from model.state import StateViews
from model.state_layout import build_state_layout
from model.transformer import Transformer
from tests.kernels.state_batches import batch

STEPS = [[(0, 18), (0, 3)], [(18, 1), (3, 1)], [(19, 1), (4, 0)]]
"""A chunk, a decode step, a step in which one request rests."""
KINDS = {"swa": 0, "csa": 1, "hca": 2}


@pytest.fixture(scope="module")
def model():
    built = Transformer(tiny(), dtype=torch.bfloat16, numerics="released")
    load_dummy_weights(built, built.config, 1)
    return built


def _run(model, layer, how):
    layout = build_state_layout(model.config, row_format="fp8", index_format="mxfp4", page_tokens=64, include_mtp=False)
    state = StateViews(
        layout,
        torch.full((3, layout.page_bytes), 0xFF, dtype=torch.uint8),
        torch.full((3, layout.slot_bytes), 0xFF, dtype=torch.uint8),
    )
    generator, outputs = torch.Generator().manual_seed(layer), []
    for requests in STEPS:
        index = batch(requests, page_tokens=64, seed=1)
        tokens = index.num_tokens
        x = torch.randn(tokens, model.config.hidden_size, generator=generator).bfloat16()
        ids = torch.zeros(tokens, dtype=torch.int64)
        with how():
            context = ForwardContext(token_ids=ids, index=index, dtype=torch.bfloat16, simulate=True)
            outputs.append(model.layers[layer].attn(Activations(x), state.layers[layer], context).float().clone())
    return torch.cat(outputs), state


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_and_twins_agree_on_a_whole_sublayer(model, kind):
    layer = KINDS[kind]
    assert model.config.layer_kind(layer) == kind
    with torch.inference_mode():
        expected, state = _run(model, layer, contextlib.nullcontext)
        got, kernel_state = _run(model, layer, forced_triton)
    off = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(off.max()) < 0.05  # products of e4m3 values, where a rounding may fall the other way
    for ours, theirs in ((kernel_state.pages_u8, state.pages_u8), (kernel_state.slots_u8, state.slots_u8)):
        assert torch.equal(ours == 0xFF, theirs == 0xFF)
        assert float((ours == theirs).float().mean()) > 0.99
