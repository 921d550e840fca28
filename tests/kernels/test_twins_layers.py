"""Twins of the per-token ops against direct formulas: norms, rotation, hyper-connections, experts, products."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from kernels.fp8_gemm import fp8_gemm_ref
from kernels.grouped_output import grouped_output_ref
from kernels.hyper_connection import (
    HyperSettings,
    HyperWeights,
    hyper_head_ref,
    hyper_post_pre,
    hyper_post_ref,
    hyper_pre_ref,
    sinkhorn,
    sinkhorn_ref,
)
from kernels.moe import ExpertWeights, route_by_score_ref, route_by_token_ref, routed_experts_ref, swiglu_ref
from kernels.quantize import dequantize_fp4, dequantize_fp8_tiles, quantize_fp4, quantize_fp8_tiles, simulate_fp8_ref
from kernels.rms_norm import rms_norm_ref
from kernels.rope import rope_angles, rope_ref
from kernels.row_linear import row_linear
from model.presets import flash
from model.rope import layer_frequencies

COUNTS = [0, 1, 2, 3, 5, 33]
SETTINGS = HyperSettings(iterations=20, hc_eps=1e-6, norm_eps=1e-6)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", COUNTS)
def test_rms_norm_is_its_formula(tokens: int) -> None:
    x, weight = randn(tokens, 3, 96), randn(96, seed=1)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(rms_norm_ref(x, None, 1e-6).double(), wanted, atol=1e-6)
    assert torch.allclose(rms_norm_ref(x, weight, 1e-6).double(), wanted * weight, atol=1e-5)
    assert rms_norm_ref(x.bfloat16(), weight, 1e-6).dtype == torch.bfloat16
    assert torch.equal(rms_norm_ref(torch.zeros(2, 8), None, 1e-6), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 128), (1, 64), (7, 96), (5, 4, 128)])
def test_rope_turns_interleaved_pairs_of_the_last_channels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape).to(dtype)
    positions = torch.arange(shape[0]) * 1000 + 3
    frequencies = layer_frequencies(flash(), 2)
    cos, sin = rope_angles(positions, frequencies)
    plain = shape[-1] - 64
    wanted = x.float().clone()
    for t in range(shape[0]):
        for k in range(32):
            angle = (positions[t].float() * frequencies[k]).double()
            a, b = x[t, ..., plain + 2 * k].double(), x[t, ..., plain + 2 * k + 1].double()
            wanted[t, ..., plain + 2 * k] = (a * angle.cos() - b * angle.sin()).float()
            wanted[t, ..., plain + 2 * k + 1] = (b * angle.cos() + a * angle.sin()).float()
    got = rope_ref(x.clone(), cos, sin)
    assert (got.float() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 0.02) if x.numel() else True
    assert torch.equal(got[..., :plain], x[..., :plain])
    back = rope_ref(got.float(), cos, sin, inverse=True)
    assert torch.allclose(back, x.float(), atol=1e-5 if dtype == torch.float32 else 0.05)


def test_frequencies_are_the_published_ones() -> None:
    plain, scaled = layer_frequencies(flash(), 0), layer_frequencies(flash(), 2)
    for k, value in {1: 0.749894202, 31: 1.3335215e-4}.items():
        assert math.isclose(plain[k].item(), value, rel_tol=1e-6)
    published = {0: 1, 1: 0.687656045, 15: 0.00363553851, 20: 2.96977785e-4, 25: 5.37231244e-6, 31: 5.6805294e-7}
    for k, value in published.items():
        assert math.isclose(scaled[k].item(), value, rel_tol=1e-6)
    assert torch.equal(scaled, layer_frequencies(flash(), 3))
    assert torch.equal(plain, layer_frequencies(flash(), 43))


@pytest.mark.parametrize("tokens", COUNTS)
def test_both_sinkhorns_agree_and_end_with_unit_columns(tokens: int) -> None:
    logits = randn(tokens, 4, 4) * 3
    fast, plain = sinkhorn(logits, 20, 1e-6), sinkhorn_ref(logits, 20, 1e-6)
    assert torch.allclose(fast, plain, atol=5e-7)
    assert torch.allclose(plain.sum(1), torch.ones(tokens, 4), atol=1e-5)
    assert torch.equal(sinkhorn(logits[:1], 20, 1e-6), fast[:1])


def hyper_weights(outputs: int) -> HyperWeights:
    return HyperWeights(randn(outputs, 4 * 32) / 12, randn(outputs, seed=1), 1 + randn(outputs, seed=2) / 10)


@pytest.mark.parametrize("tokens", COUNTS)
def test_hyper_connection_is_its_formula(tokens: int) -> None:
    streams, weights, norm = randn(tokens, 4, 32), hyper_weights(24), randn(32, seed=3)
    x, mix = hyper_pre_ref(streams, weights, norm, SETTINGS)
    v = streams.flatten(1).double()
    m = (v @ weights.fn.double().T) / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    m = m * weights.scale + weights.base
    pre, post = m[:, :4].sigmoid() + 1e-6, 2 * m[:, 4:8].sigmoid()
    y = torch.einsum("ti,tid->td", pre, streams.double())
    wanted = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
    assert torch.allclose(x.double(), wanted, atol=1e-5)
    assert torch.allclose(mix.post_TS.double(), post, atol=1e-5)
    output = randn(tokens, 32, seed=4)
    after = hyper_post_ref(output, streams, mix)
    comb = sinkhorn_ref(m[:, 8:].unflatten(1, (4, 4)).float(), 20, 1e-6).double()
    wanted = post[..., None] * output[:, None] + torch.einsum("tij,tid->tjd", comb, streams.double())
    assert torch.allclose(after.double(), wanted, atol=1e-5)
    fused = hyper_post_pre(output, streams, mix, weights, norm, SETTINGS)
    again = hyper_pre_ref(after, weights, norm, SETTINGS)
    assert torch.equal(fused[0], after)
    assert torch.equal(fused[1].plain, again[0])


@pytest.mark.parametrize("tokens", COUNTS)
def test_hyper_head_collapses_the_streams(tokens: int) -> None:
    streams, weights = randn(tokens, 4, 32), hyper_weights(4)
    v = streams.flatten(1).double()
    m = (v @ weights.fn.double().T) / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights.scale + weights.base
    wanted = torch.einsum("ti,tid->td", m.sigmoid() + 1e-6, streams.double())
    assert torch.allclose(hyper_head_ref(streams, weights, SETTINGS).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(8, 128), (24, 1024), (160, 256)])
def test_a_row_of_a_product_does_not_depend_on_the_other_rows(
    rows: int, columns: int, dtype: torch.dtype, one_thread: None
) -> None:
    x, weight = randn(300, columns).to(dtype), randn(rows, columns, seed=1).to(dtype)
    whole = row_linear(x, weight)
    for start, stop in ((0, 1), (5, 7), (10, 13), (0, 4), (290, 300), (299, 300), (7, 207)):
        assert torch.equal(row_linear(x[start:stop], weight), whole[start:stop])
    assert row_linear(x[:0], weight).shape == (0, rows)
    assert torch.equal(row_linear(x[0], weight), whole[0])


def test_routing_weights_leave_the_bias_out_and_ties_go_to_the_lower_expert() -> None:
    x, gate = randn(9, 16), randn(6, 16, seed=1)
    bias = torch.tensor([0.0, 5.0, 0.0, 5.0, 0.0, -5.0])
    experts, weights = route_by_score_ref(x, gate, bias, 2, 1.5)
    scores = torch.nn.functional.softplus(x @ gate.T).sqrt()
    assert experts.sort(-1).values.tolist() == [[1, 3]] * 9
    assert torch.allclose(weights.sum(-1), torch.full((9,), 1.5))
    picked = scores.gather(1, experts)
    assert torch.allclose(weights, 1.5 * picked / picked.sum(-1, keepdim=True), atol=1e-6)
    same, _ = route_by_score_ref(torch.zeros(3, 16), gate, torch.zeros(6), 4, 1.0)
    assert same.tolist() == [[0, 1, 2, 3]] * 3


def test_routing_survives_extreme_logits() -> None:
    gate = torch.eye(4)
    for logits in ([-200.0] * 4, [200.0, 100.0, -100.0, -200.0], [-17.0, -18.0, -19.0, -20.0], [20.0, 20.1, 19.9, 0.0]):
        experts, weights = route_by_score_ref(torch.tensor([logits]), gate, torch.zeros(4), 2, 1.0)
        assert weights.isfinite().all()
        assert sorted(experts[0].tolist()) == [0, 1]
    # log1p keeps what log(1 + exp(x)) loses below -16.6.
    _, weights = route_by_score_ref(torch.tensor([[-18.0, -18.0, -30.0, -30.0]]), gate, torch.zeros(4), 2, 1.0)
    assert torch.allclose(weights, torch.tensor([[0.5, 0.5]]))


def test_hash_routing_takes_the_experts_of_the_token_id() -> None:
    table = torch.tensor([[0, 1], [3, 2], [1, 4]], dtype=torch.int32)
    experts, weights = route_by_token_ref(randn(4, 8), randn(5, 8, seed=1), table, torch.tensor([2, 0, 1, 1]), 2.0)
    assert experts.tolist() == [[1, 4], [0, 1], [3, 2], [3, 2]]
    assert torch.allclose(weights.sum(-1), torch.full((4,), 2.0))


def naive_experts(x, experts, weights, w13, w2, first, limit):
    output = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for expert, weight in zip(experts[t].tolist(), weights[t].tolist(), strict=True):
            local = expert - first
            if 0 <= local < w13.shape[0]:
                gate, up = (w13[local].double() @ x[t].double()).chunk(2)
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                output[t] += w2[local].double() @ (gate * gate.sigmoid() * up * weight)
    return output


@pytest.mark.parametrize("local", [range(6), range(2, 4), range(5, 6)])
@pytest.mark.parametrize("tokens", COUNTS)
def test_routed_experts_are_a_sum_over_the_local_ones(tokens: int, local: range) -> None:
    x, w13, w2 = randn(tokens, 64), randn(6, 64, 64, seed=1) / 4, randn(6, 64, 32, seed=2) / 4
    experts = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(3)).topk(2).indices
    weights = randn(tokens, 2, seed=4).abs()
    bank = ExpertWeights(local.start, w13[local.start : local.stop], w2[local.start : local.stop])
    got = routed_experts_ref(x, experts, weights, bank, limit=0.8, simulate=False)
    wanted = naive_experts(x, experts, weights, bank.w13, bank.w2, local.start, 0.8)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), wanted, atol=1e-5)


def test_packed_experts_compute_what_their_dequantised_weights_do() -> None:
    x, experts, weights = randn(7, 64), torch.tensor([[0, 2]] * 7), randn(7, 2, seed=4).abs()
    packed13, scale13 = quantize_fp4(randn(3, 64, 64, seed=1), 32)
    packed2, scale2 = quantize_fp4(randn(3, 64, 32, seed=2), 32)
    packed = ExpertWeights(0, packed13, packed2, scale13, scale2)
    plain = ExpertWeights(0, dequantize_fp4(packed13, scale13, 32), dequantize_fp4(packed2, scale2, 32))
    got = [routed_experts_ref(x, experts, weights, bank, limit=10.0, simulate=True) for bank in (packed, plain)]
    assert torch.equal(*got)


def test_the_clamp_bounds_the_gate_above_and_the_up_on_both_sides() -> None:
    gate, up = torch.tensor([20.0, -20.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 50.0, -50.0])
    silu = torch.nn.functional.silu
    wanted = torch.stack((silu(torch.tensor(10.0)), silu(torch.tensor(-20.0)), silu(gate[2]) * 10, silu(gate[3]) * -10))
    assert torch.allclose(swiglu_ref(gate, up, 10.0), wanted)


@pytest.mark.parametrize("tokens", COUNTS)
def test_grouped_output_multiplies_each_group_by_its_block(tokens: int) -> None:
    x, weight = randn(tokens, 3, 40), randn(3, 16, 40, seed=1)
    wanted = torch.einsum("tgc,grc->tgr", x, weight).flatten(1)
    assert torch.allclose(grouped_output_ref(x, weight), wanted, atol=1e-5)


@pytest.mark.parametrize("tokens", COUNTS)
def test_fp8_gemm_is_the_product_of_the_dequantised_operands(tokens: int) -> None:
    x, (codes, scales) = randn(tokens, 300), quantize_fp8_tiles(randn(200, 300, seed=1), 128)
    wanted = simulate_fp8_ref(x, 128).double() @ dequantize_fp8_tiles(codes, scales, 128).double().T
    assert torch.allclose(fp8_gemm_ref(x, codes, scales).double(), wanted, atol=1e-3)
