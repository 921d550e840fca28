"""Routed experts against the reference: sorting, quantised rows, both grouped products, the combination."""

from __future__ import annotations

import pytest
import torch

from kernels import cuda_build
from kernels.exchange_rows import RowFormat, pack_rows_ref, unpack_rows
from kernels.gpu_experts import (
    BLOCK_ROWS,
    block_rows_for,
    fits_hopper,
    pack_bank,
    packed_down,
    packed_up,
    routed_experts_gpu,
)
from kernels.moe import ExpertWeights, routed_experts_ref, swiglu_ref
from kernels.packed_experts import MAX_SHIFT
from kernels.quantize import decode_e8m0, dequantize_fp4, quantize_fp8, simulate_fp8
from kernels.triton_expert_rows import ROW_ALIGN, combine_rows, quantize_rows, sort_by_expert


def _weights(generator, device, experts, hidden, width, first=0) -> ExpertWeights:
    def codes(rows, channels):
        return torch.randint(
            0, 256, (experts, rows, channels // 2), dtype=torch.uint8, generator=generator, device=device
        )

    def scales(rows, channels):
        shape = (experts, rows, channels // 32)
        return torch.randint(117, 122, shape, dtype=torch.uint8, generator=generator, device=device)

    return ExpertWeights(
        first, codes(2 * width, hidden), codes(hidden, width), scales(2 * width, hidden), scales(hidden, width)
    )


def _routing(generator, device, tokens, topk, total):
    scores = torch.rand(tokens, total, generator=generator, device=device)
    experts = scores.topk(topk, dim=-1).indices if tokens else torch.empty(0, topk, dtype=torch.int64, device=device)
    return experts, torch.rand(tokens, topk, generator=generator, device=device) + 0.1


@pytest.mark.parametrize(("tokens", "topk", "total", "first", "local"), [
    (0, 2, 8, 0, 8), (1, 1, 4, 3, 1), (7, 2, 8, 2, 4), (700, 6, 256, 64, 64), (33, 6, 300, 5, 257),
    (2731, 6, 256, 64, 64), (2731, 6, 600, 5, 500),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_local_choice_gets_its_own_row_among_its_experts(
    generator, device, tokens, topk, total, first, local, dtype
):
    experts, _ = _routing(generator, device, tokens, topk, total)
    apart = torch.full((tokens, topk + 3), first, dtype=dtype, device=device)
    apart[:, :topk] = experts
    rows = sort_by_expert(apart[:, :topk], first, local)
    mine = (experts >= first) & (experts < first + local)
    counts = torch.bincount(experts[mine] - first, minlength=local)
    aligned = (counts + ROW_ALIGN - 1) // ROW_ALIGN * ROW_ALIGN
    assert torch.equal(rows.offsets_E, torch.cat((counts.new_zeros(1), aligned.cumsum(0))).int())
    assert torch.equal(rows.row_TK >= 0, mine)
    taken, start = rows.row_TK[mine], rows.offsets_E[experts[mine] - first]
    assert taken.unique().numel() == taken.numel()
    assert bool((start <= taken).all())
    assert bool((taken < start + counts[experts[mine] - first]).all())


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 128), (5, 384), (9, 2048)])
def test_quantised_rows_are_the_released_codes_bit_for_bit(generator, device, tokens, hidden):
    experts, weights = _routing(generator, device, tokens, 2, 4)
    x = torch.randn(tokens, hidden + 64, generator=generator, device=device).bfloat16()[:, :hidden]
    x[0, :128] = 0.0
    rows = sort_by_expert(experts, 1, 2)
    got, route = quantize_rows(x, weights, rows)
    codes, scales = quantize_fp8(x, 128)
    for token, choice in (rows.row_TK >= 0).nonzero().tolist():
        row = int(rows.row_TK[token, choice])
        assert torch.equal(got.codes_RD[row].view(torch.uint8), codes[token])
        assert torch.equal(got.scales_GR[:, row], decode_e8m0(scales[token]))
        assert route[row] == weights[token, choice]


@pytest.mark.parametrize(("tokens", "hidden"), [(0, 128), (5, 384), (9, 2048)])
def test_tokens_that_arrive_quantised_become_the_same_rows(generator, device, tokens, hidden):
    experts, weights = _routing(generator, device, tokens, 3, 6)
    x = (100 * torch.randn(tokens, hidden, generator=generator, device=device)).bfloat16()
    rows = sort_by_expert(experts, 1, 3)
    layout = RowFormat(hidden, 3, torch.bfloat16, quantised=True)
    arrived, _, arrived_weights = unpack_rows(pack_rows_ref(x, experts, weights, layout, tokens, 6), layout)
    got, got_route = quantize_rows(arrived, arrived_weights, rows)
    expected, route = quantize_rows(x, weights, rows)
    used = rows.row_TK[rows.row_TK >= 0].long()
    assert torch.equal(got.codes_RD[used].view(torch.uint8), expected.codes_RD[used].view(torch.uint8))
    assert torch.equal(got.scales_GR[:, used], expected.scales_GR[:, used])
    assert torch.equal(got_route[used], route[used])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 128), (1, 130), (6, 1500)])
def test_combining_sums_a_tokens_own_rows_and_no_others(generator, device, tokens, hidden, shared, dtype):
    experts, _ = _routing(generator, device, tokens, 3, 6)
    rows = sort_by_expert(experts, 2, 3)
    y = torch.full((tokens * 3 + 3 * ROW_ALIGN, hidden), torch.nan, dtype=torch.bfloat16, device=device)
    used = rows.row_TK[rows.row_TK >= 0].long()
    y[used] = torch.randn(used.numel(), hidden, generator=generator, device=device).bfloat16()
    other = torch.randn(tokens, hidden, generator=generator, device=device).to(dtype) if shared else None
    got = combine_rows(y, rows, other, dtype)
    assert got.dtype == dtype
    expected = torch.zeros(tokens, hidden, device=device)
    for choice in range(3):
        row = rows.row_TK[:, choice].long()
        expected += torch.where((row >= 0)[:, None], y[row.clamp(min=0)].float(), 0.0)
    if other is not None:
        expected += other.float()
    assert torch.equal(got, expected.to(dtype))


def _relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


TOLERANCE = 4e-3
"""Outputs are bf16; where a sum's last bits decide, a SwiGLU output rounds to the neighbouring e4m3 code."""
FP8_SUM_TOLERANCE = 1.5e-2
"""FP8 tensor cores add with fewer bits than float32, 1e-4 of a sum over 128 channels: more codes flip."""


def _reference(x, experts, route, weights: ExpertWeights, limit: float):
    """kernels.moe.routed_experts_ref with sums kept in float32 up to the three roundings that the op promises."""
    assert weights.w13_scale is not None
    assert weights.w2_scale is not None
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    inputs = simulate_fp8(x, 128).float()
    for local in range(weights.w13.shape[0]):
        token, choice = (experts == weights.first + local).nonzero(as_tuple=True)
        both = inputs[token] @ dequantize_fp4(weights.w13[local], weights.w13_scale[local], 32).T
        gate, up = both.chunk(2, -1)
        hidden = simulate_fp8((swiglu_ref(gate, up, limit) * route[token, choice][:, None]).bfloat16(), 128).float()
        y = (hidden @ dequantize_fp4(weights.w2[local], weights.w2_scale[local], 32).T).bfloat16()
        output.index_add_(0, token, y.float())
    return output


CASES = [(0, 2, 4, 0, 4), (1, 2, 8, 2, 4), (3, 1, 1, 0, 1), (40, 2, 8, 4, 3), (65, 3, 5, 0, 5)]


@pytest.mark.parametrize(("tokens", "topk", "total", "first", "local"), CASES)
def test_triton_experts_match_the_reference(generator, device, tokens, topk, total, first, local):
    weights = _weights(generator, device, local, 256, 128, first)
    experts, route = _routing(generator, device, tokens, topk, total)
    x = (2 * torch.randn(tokens, 256, generator=generator, device=device)).bfloat16()
    got = routed_experts_gpu(x, experts, route, weights, limit=10.0, block_rows=16)
    expected = _reference(x, experts, route, weights, 10.0)
    assert got.shape == expected.shape
    assert _relative(got, expected) < TOLERANCE


def test_the_models_reference_agrees_but_for_its_bf16_sums(generator, device):
    weights = _weights(generator, device, 4, 256, 128)
    experts, route = _routing(generator, device, 30, 2, 4)
    x = torch.randn(30, 256, generator=generator, device=device).bfloat16()
    expected = routed_experts_ref(x, experts, route, weights, limit=10.0, simulate=True)
    assert _relative(_reference(x, experts, route, weights, 10.0), expected) < 2e-2


def test_an_experts_rows_do_not_depend_on_the_rest_of_the_batch(generator, device):
    weights = _weights(generator, device, 4, 256, 128)
    experts, route = _routing(generator, device, 37, 2, 4)
    x = torch.randn(37, 256, generator=generator, device=device).bfloat16()
    whole = routed_experts_gpu(x, experts, route, weights, limit=10.0, block_rows=16)
    for token in (0, 17, 36):
        alone = routed_experts_gpu(x[token : token + 1], experts[token : token + 1], route[token : token + 1], weights,
                                   limit=10.0, block_rows=16)  # fmt: skip
        assert torch.equal(alone[0], whole[token])


def test_the_swiglu_clamps_what_exceeds_the_limit(generator, device):
    weights = _weights(generator, device, 2, 128, 128)
    experts, route = _routing(generator, device, 9, 1, 2)
    x = (300 * torch.randn(9, 128, generator=generator, device=device)).bfloat16()
    got = routed_experts_gpu(x, experts, route, weights, limit=0.5, block_rows=16)
    expected = _reference(x, experts, route, weights, 0.5)
    assert _relative(got, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 8), (256, 16), (1024, 48), (2048, 64), (4096, 64), (15000, 64), (15100, 128)]
)
def test_block_rows_cover_an_experts_usual_share(tokens, expected):
    assert block_rows_for(tokens, 6, 256) == expected


def test_no_cuda_kernel_is_promised_where_none_can_run():
    if torch.cuda.is_available():
        return
    with pytest.raises(cuda_build.CudaUnavailable, match="no CUDA device"):
        cuda_build.load("experts_few")
    assert not fits_hopper(128, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
@pytest.mark.parametrize(
    ("tokens", "topk", "total", "first", "local"), [*CASES, (900, 2, 3, 0, 3), (150, 6, 256, 64, 64)]
)
def test_hopper_experts_match_the_reference(generator, device, tokens, topk, total, first, local, block_rows):
    weights = _weights(generator, device, local, 512, 256, first)
    assert fits_hopper(256, 512)
    experts, route = _routing(generator, device, tokens, topk, total)
    x = (2 * torch.randn(tokens, 512, generator=generator, device=device)).bfloat16()
    got = routed_experts_gpu(x, experts, route, pack_bank(weights), limit=10.0, block_rows=block_rows)
    expected = _reference(x, experts, route, weights, 10.0)
    assert _relative(got, expected) < FP8_SUM_TOLERANCE


@pytest.mark.gpu
def test_hopper_experts_do_not_depend_on_block_size_or_batch(generator, device):
    weights = _weights(generator, device, 3, 512, 256)
    bank = pack_bank(weights)
    experts, route = _routing(generator, device, 700, 2, 3)
    x = torch.randn(700, 512, generator=generator, device=device).bfloat16()
    results = [routed_experts_gpu(x, experts, route, bank, limit=10.0, block_rows=size) for size in BLOCK_ROWS]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    alone = routed_experts_gpu(x[5:6], experts[5:6], route[5:6], bank, limit=10.0, block_rows=8)
    assert torch.equal(alone[0], results[0][5])


@pytest.mark.gpu
def test_hopper_experts_know_groups_far_below_their_rows_largest(generator, device):
    """Shifts of 12 and more make subnormal values, which take another way."""
    weights = _weights(generator, device, 3, 512, 256)
    for scale in (weights.w13_scale, weights.w2_scale):
        scale.copy_(torch.randint(119 - MAX_SHIFT, 120, scale.shape, generator=generator, device=device))
    bank = pack_bank(weights)
    experts, route = _routing(generator, device, 300, 2, 3)
    x = torch.randn(300, 512, generator=generator, device=device).bfloat16()
    expected = _reference(x, experts, route, weights, 10.0)
    results = [routed_experts_gpu(x, experts, route, bank, limit=10.0, block_rows=size) for size in BLOCK_ROWS]
    assert _relative(results[0], expected) < FP8_SUM_TOLERANCE
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "width"), [(256, 128), (768, 256), (1024, 512)])
@pytest.mark.parametrize("total", [1, 3, 40])
def test_hopper_experts_of_any_shape_and_load_are_the_same_in_small_blocks_and_large(
    generator, device, hidden, width, total
):
    """One packed tile or an odd number, fewer stages than a CTA holds; experts without rows, and one with most."""
    bank = pack_bank(_weights(generator, device, total, hidden, width))
    tokens, topk = 1500, min(2, total)
    scores = torch.rand(tokens, total, generator=generator, device=device)
    scores[:, total // 2] += 0.4
    scores[:, total // 3 : total // 2] -= 2.0
    experts = scores.topk(topk, dim=-1).indices
    route = torch.rand(tokens, topk, generator=generator, device=device) + 0.1
    x = torch.randn(tokens, hidden, generator=generator, device=device).bfloat16()
    small, large = (routed_experts_gpu(x, experts, route, bank, limit=10.0, block_rows=size) for size in (64, 128))
    assert bool(small.isfinite().all())
    assert torch.equal(small, large)


@pytest.mark.gpu
@pytest.mark.parametrize("block_rows", [32, 128])
def test_hopper_products_leave_rows_of_nobody_alone(generator, device, block_rows):
    weights = _weights(generator, device, 4, 512, 256, first=4)
    bank = pack_bank(weights)
    experts, route = _routing(generator, device, 50, 2, 8)
    x = torch.randn(50, 512, generator=generator, device=device).bfloat16()
    rows = sort_by_expert(experts, 4, 4)
    inputs, route_weight = quantize_rows(x, route, rows)
    used = rows.row_TK[rows.row_TK >= 0].long()
    nobody = torch.ones(inputs.codes_RD.shape[0], dtype=torch.bool, device=device)
    nobody[used] = False
    inputs.codes_RD.view(torch.uint8)[nobody] = 0x7F  # NaN
    inputs.scales_GR[:, : nobody.numel()][:, nobody] = torch.nan
    hidden = packed_up(inputs, bank.up, rows.offsets_E, route_weight, 10.0, block_rows)
    assert bool(hidden.codes_RD[used].float().isfinite().all())
    assert bool(packed_down(hidden, bank.down, rows.offsets_E, block_rows)[used].float().isfinite().all())
