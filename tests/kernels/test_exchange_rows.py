"""Rows of the expert exchange: what is packed comes out again, and quantised rows change nothing for the experts."""

from __future__ import annotations

import pytest
import torch

from kernels.exchange_rows import QuantizedTokens, RowFormat, add_sums_ref, pack_rows_ref, unpack_rows
from kernels.moe import ExpertWeights, routed_experts, routed_experts_ref
from kernels.quantize import simulate_fp8
from kernels.triton_exchange_rows import add_sums_gpu, pack_rows_gpu

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
    got_x, got_experts, got_weights = unpack_rows(packed, layout)
    if isinstance(got_x, QuantizedTokens):
        assert got_x.shape == (rows, hidden)
        got_x = got_x.values()
    assert torch.equal(got_x[:tokens], simulate_fp8(x, 128) if quantised else x)
    assert torch.equal(got_experts[:tokens], experts.int())
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
    arrived = unpack_rows(pack_rows_ref(x, chosen % experts, weights, layout, 41, experts), layout)
    direct = routed_experts_ref(x, chosen % experts, weights, local, limit=10.0, simulate=True)
    through = routed_experts(*arrived, local, limit=10.0, simulate=True)
    assert torch.equal(through[:40], direct)
    assert not through[40].any(), "padding reaches no expert"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "hidden", "topk"), [(0, 0, 128, 2), (0, 2, 128, 6), (3, 5, 384, 1), (2, 2, 2048, 6)]
)
def test_packing_matches_the_twin(generator, device, tokens, rows, hidden, topk, dtype):
    x, experts, weights = case(generator, device, tokens, hidden, topk, dtype)
    wide = torch.full((tokens, hidden + 64), torch.nan, dtype=dtype, device=device)
    wide[:, :hidden] = x
    layout = RowFormat(hidden, topk, dtype, quantised=True)
    packed = pack_rows_gpu(wide[:, :hidden], experts, weights, layout, rows, NOWHERE)
    expected = pack_rows_ref(x, experts, weights, layout, rows, NOWHERE)
    for part in (
        slice(0, 8 * topk),
        slice(layout.token_offset, layout.token_offset + hidden),
        slice(layout.scale_offset, layout.scale_offset + hidden // 128),
    ):
        assert torch.equal(packed[:tokens, part], expected[:tokens, part])
    assert torch.equal(packed[tokens:, 4 * topk : 8 * topk], expected[tokens:, 4 * topk : 8 * topk])


@pytest.mark.parametrize("sums_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "tokens", "rows", "hidden"), [(1, 0, 2, 128), (1, 3, 3, 130), (4, 5, 9, 1500)])
def test_sums_of_ranks_are_added_in_their_order_and_rounded_once(
    generator, device, ranks, tokens, rows, hidden, dtype, sums_dtype
):
    sums = torch.randn(ranks, rows, hidden, generator=generator, device=device).to(sums_dtype)
    shared = torch.randn(tokens, hidden, generator=generator, device=device).to(dtype)
    got, expected = torch.full((2, tokens + 1, hidden + 3), torch.nan, dtype=dtype, device=device)
    add_sums_gpu(sums, shared, got[:tokens, :hidden])
    add_sums_ref(sums, shared, expected[:tokens, :hidden])
    assert torch.equal(got[:tokens, :hidden], expected[:tokens, :hidden])
    assert bool(got[tokens:].isnan().all())
    assert bool(got[:, hidden:].isnan().all())
    got = got[:tokens, :hidden]
    exact = sums[:, :tokens].double().sum(0) + shared.double()
    assert torch.allclose(got.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
