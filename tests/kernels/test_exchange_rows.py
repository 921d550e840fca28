"""Rows of the expert exchange: what is packed comes out again, and quantised rows change nothing for the experts."""

from __future__ import annotations

import pytest
import torch

from kernels.exchange_rows import RowFormat, pack_rows_ref, unpack_rows_ref
from kernels.moe import ExpertWeights, routed_experts_ref
from kernels.quantize import simulate_fp8
from kernels.triton_exchange_rows import pack_rows_gpu, unpack_rows_gpu

NOWHERE = 99


def case(generator, device, tokens, hidden, topk, dtype):
    x = torch.randn(tokens, hidden, generator=generator, device=device)
    x *= torch.exp2(torch.randint(-20, 12, (tokens, 1), generator=generator, device=device).float())
    experts = torch.randint(0, NOWHERE, (tokens, topk), generator=generator, device=device)
    weights = torch.rand(tokens, topk, generator=generator, device=device)
    return x.to(dtype), experts, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("tokens", "rows", "hidden", "topk"), [(0, 0, 64, 2), (0, 3, 130, 6), (5, 5, 128, 1), (4, 9, 200, 3)]
)
def test_what_is_packed_comes_out_again(generator, device, tokens, rows, hidden, topk, quantised, dtype):
    x, experts, weights = case(generator, device, tokens, hidden, topk, dtype)
    layout = RowFormat(hidden, topk, dtype, quantised)
    packed = pack_rows_ref(x, experts, weights, layout, rows, NOWHERE)
    assert packed.shape == (rows, layout.row_bytes)
    got_x, got_experts, got_weights = unpack_rows_ref(packed, layout)
    assert torch.equal(got_x[:tokens], simulate_fp8(x, 128) if quantised else x)
    assert torch.equal(got_experts[:tokens], experts)
    assert torch.equal(got_weights[:tokens], weights)
    assert (got_experts[tokens:] == NOWHERE).all()
    assert got_x.dtype == dtype


def test_experts_that_round_their_inputs_cannot_tell_quantised_rows(generator, device):
    """Amounts near the top of the e4m3 range too, where rounding reaches the next power of two."""
    hidden, width, experts = 256, 128, 4
    x, chosen, weights = case(generator, device, 40, hidden, 2, torch.float32)
    x[0, 0], x[1, 5] = 447.0, -460.0
    local = ExpertWeights(
        0,
        torch.randn(experts, 2 * width, hidden, generator=generator, device=device),
        torch.randn(experts, hidden, width, generator=generator, device=device),
    )
    layout = RowFormat(hidden, 2, torch.float32, quantised=True)
    arrived = unpack_rows_ref(pack_rows_ref(x, chosen % experts, weights, layout, 41, experts), layout)
    direct = routed_experts_ref(x, chosen % experts, weights, local, limit=10.0, simulate=True)
    through = routed_experts_ref(*arrived, local, limit=10.0, simulate=True)
    assert torch.equal(through[:40], direct)
    assert not through[40].any(), "padding reaches no expert"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "hidden", "topk"), [(0, 0, 128, 2), (0, 2, 128, 6), (3, 5, 384, 1), (2, 2, 2048, 6)]
)
def test_kernels_match_the_twins(generator, device, tokens, rows, hidden, topk, dtype):
    x, experts, weights = case(generator, device, tokens, hidden, topk, dtype)
    wide = torch.full((tokens, hidden + 64), torch.nan, dtype=dtype, device=device)
    wide[:, :hidden] = x
    layout = RowFormat(hidden, topk, dtype, quantised=True)
    packed = pack_rows_gpu(wide[:, :hidden], experts, weights, layout, rows, NOWHERE)
    unpacked = unpack_rows_gpu(packed, layout)
    expected = pack_rows_ref(x, experts, weights, layout, rows, NOWHERE)
    for part in (
        slice(0, 8 * topk),
        slice(layout.token_offset, layout.token_offset + hidden),
        slice(layout.scale_offset, layout.scale_offset + hidden // 128),
    ):
        assert torch.equal(packed[:tokens, part], expected[:tokens, part])
    assert torch.equal(packed[tokens:, 4 * topk : 8 * topk], expected[tokens:, 4 * topk : 8 * topk])
    for got, wanted in zip(unpacked, unpack_rows_ref(expected, layout), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got[:tokens], wanted[:tokens])
    assert (unpacked[1][tokens:] == NOWHERE).all()


def test_every_code_and_scale_is_unpacked_exactly(device):
    layout = RowFormat(256, 1, torch.bfloat16, quantised=True)
    rows = torch.zeros(3, layout.row_bytes, dtype=torch.uint8, device=device)
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes[[127, 255]] = 0  # not a number
    rows[:, layout.token_offset : layout.token_offset + 256] = codes
    rows[:, layout.scale_offset : layout.scale_offset + 2] = torch.tensor(
        [[127, 127], [104, 160], [120, 110]], dtype=torch.uint8, device=device
    )
    assert torch.equal(unpack_rows_gpu(rows, layout)[0], unpack_rows_ref(rows, layout)[0])
