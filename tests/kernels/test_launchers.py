"""Launchers run the GPU's kernel where the inputs are made for it, and the twin elsewhere."""

from __future__ import annotations

import contextlib

import pytest
import torch

from kernels import fp8_gemm, hyper_connection, moe
from kernels.attention_inputs import attention_inputs
from kernels.compressor import EntryTarget, compress_overlapping, compress_pending
from kernels.dispatch import forced_triton
from kernels.exchange_rows import QuantizedTokens, RowFormat, add_sums, pack_rows, unpack_rows
from kernels.gpu_experts import routed_experts_gpu
from kernels.hyper_connection import HyperSettings, HyperWeights, Mix
from kernels.indexer import index_query, select_entries
from kernels.quantize import quantize_fp4, quantize_fp8_tiles
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_angles
from kernels.triton_fp8_gemm import fp8_product
from kernels.triton_hyper_connection import hyper_post_triton, hyper_pre_triton
from kernels.triton_quantize import quantize_activations
from kernels.window_ring import insert_window
from tests.kernels.state_batches import batch, moved, pool, pool_copy


@pytest.fixture
def on_gpu(device):
    """As on a GPU: CUDA tensors run kernels by themselves, CPU tensors when forced."""
    return contextlib.nullcontext() if device.type == "cuda" else forced_triton()


def test_fp8_products_run_the_kernel(generator, device, on_gpu):
    codes, scales = quantize_fp8_tiles(torch.randn(64, 128, generator=generator, device=device), 128)
    x = torch.randn(3, 128, generator=generator, device=device).bfloat16()
    with on_gpu:
        got = fp8_gemm.fp8_gemm(x, codes, scales)
    assert torch.equal(got, fp8_product(quantize_activations(x), codes, scales, x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hyper_connections_run_the_kernel_on_bf16_streams_only(generator, device, on_gpu, dtype):
    streams = torch.randn(2, 4, 128, generator=generator, device=device).to(dtype)
    output = torch.randn(2, 128, generator=generator, device=device).to(dtype)
    weights = HyperWeights(
        *(torch.randn(*shape, generator=generator, device=device) for shape in ((24, 512), (24,), (24,)))
    )
    norm, settings = torch.ones(128, device=device), HyperSettings(3, 1e-6, 1e-6)
    mix = Mix(torch.rand(2, 4, device=device), torch.rand(2, 4, 4, device=device))
    with on_gpu:
        got, _ = hyper_connection.hyper_pre(streams, weights, norm, settings)
        new = hyper_connection.hyper_post(output, streams, mix)
    if dtype == torch.bfloat16:
        expected, _ = hyper_pre_triton(streams, weights, norm, settings)
        expected_new = hyper_post_triton(output, streams, mix)
    else:
        expected, _ = hyper_connection.hyper_pre_ref(streams, weights, norm, settings)
        expected_new = hyper_connection.hyper_post_ref(output, streams, mix)
    assert torch.equal(got.plain, expected)
    assert torch.equal(new, expected_new)


def test_routers_run_the_kernel_and_agree_with_their_twins(generator, device, on_gpu):
    x = torch.randn(5, 32, generator=generator, device=device)
    gate = torch.randn(12, 32, generator=generator, device=device)
    bias = torch.randn(12, generator=generator, device=device)
    table = torch.randint(0, 12, (9, 3), generator=generator, device=device)
    ids = torch.tensor([8, 0, 3, 3, 1], device=device)
    with on_gpu:
        scored = moe.route_by_score(x, gate, bias, 3, 1.5)
        given = moe.route_by_token(x, gate, table, ids, 1.5, real_T=ids < 5, nowhere=12)
    twin = moe.route_by_token_ref(x, gate, table, ids, 1.5)
    for got, expected in (
        (scored, moe.route_by_score_ref(x, gate, bias, 3, 1.5)),
        (given, (torch.where(ids[:, None] < 5, twin[0], 12), twin[1])),
    ):
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("simulate", [True, False])
def test_packed_experts_run_the_kernel_under_the_released_rounding_only(generator, device, on_gpu, simulate):
    def packed(rows, channels):
        return quantize_fp4(torch.randn(2 * rows, channels, generator=generator, device=device) / 16, 32)

    (w13, s13), (w2, s2) = packed(256, 128), packed(128, 128)
    local = moe.ExpertWeights(0, *(tensor.unflatten(0, (2, -1)) for tensor in (w13, w2, s13, s2)))
    x = torch.randn(4, 128, generator=generator, device=device).bfloat16()
    experts = torch.tensor([[0, 1], [1, 0], [1, 3], [2, 3]], device=device)
    route = torch.rand(4, 2, generator=generator, device=device)
    with on_gpu:
        got = moe.routed_experts(x, experts, route, local, limit=10.0, simulate=simulate)
    if simulate:
        expected = routed_experts_gpu(x, experts, route, local, limit=10.0, block_rows=16)
    else:
        expected = moe.routed_experts_ref(x, experts, route, local, limit=10.0, simulate=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("hidden", [128, 96])
def test_experts_take_tokens_that_arrived_quantised_and_add_the_shared_one(generator, device, on_gpu, hidden):
    """Hidden sizes that the kernels cannot take run the twin."""

    def packed(rows, channels):
        return quantize_fp4(torch.randn(2 * rows, channels, generator=generator, device=device) / 16, 32)

    (w13, s13), (w2, s2) = packed(256, hidden), packed(hidden, 128)
    local = moe.ExpertWeights(0, *(tensor.unflatten(0, (2, -1)) for tensor in (w13, w2, s13, s2)))
    x = torch.randn(5, hidden, generator=generator, device=device).bfloat16()
    experts = torch.tensor([[0, 1], [1, 0], [1, 3], [2, 3], [0, 3]], device=device)
    route = torch.rand(5, 2, generator=generator, device=device)
    shared = torch.randn(5, hidden, generator=generator, device=device).bfloat16()
    layout = RowFormat(hidden, 2, torch.bfloat16, quantised=True)
    with on_gpu:
        arrived = unpack_rows(pack_rows(x, experts, route, layout, 6, 4), layout)
        assert isinstance(arrived[0], QuantizedTokens)
        sums = moe.routed_experts(*arrived, local, limit=10.0, simulate=True)
        rounded = moe.routed_experts(*arrived, local, limit=10.0, simulate=True, dtype=torch.bfloat16)
        together = moe.routed_experts(x, experts, route, local, limit=10.0, simulate=True, shared_TD=shared)
        added = torch.empty_like(shared)
        add_sums(sums[None], shared, added)
    assert sums.dtype == torch.float32
    assert torch.equal(rounded, sums.bfloat16())
    assert torch.equal(together, added)
    assert not sums[5].any()


def test_a_quantised_swiglu_is_the_swiglu_quantised(generator, device, on_gpu):
    gate, up = (20 * torch.randn(3, 384, generator=generator, device=device).bfloat16() for _ in range(2))
    with on_gpu:
        got = moe.swiglu(gate, up, 10.0, quantize=True)
        expected = quantize_activations(moe.swiglu(gate, up, 10.0))
        assert isinstance(moe.swiglu(gate[:, :96], up[:, :96], 10.0, quantize=True), torch.Tensor)
    assert torch.equal(got.codes_RD.view(torch.uint8), expected.codes_RD.view(torch.uint8))
    assert torch.equal(got.scales_GR[:, :3], expected.scales_GR[:, :3])


def _twin_and_kernel(device, on_gpu, run):
    """What `run(device)` gives through the twins, then through the launchers as on a GPU; both on the CPU."""
    expected = run(torch.device("cpu"))
    with on_gpu:
        return run(device).cpu(), expected


@pytest.mark.parametrize("single", [True, False])
def test_a_layers_state_ops_run_the_kernels(device, on_gpu, single):
    requests = [(39, 1), (11, 1)] if single else [(39, 5), (0, 9)]

    def run(where):
        generator = torch.Generator().manual_seed(3)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        index = moved(batch(requests), where)
        ring, entries, keys = (
            pool_copy(pool(3, 16, 128, "bf16", 64), where),
            pool_copy(pool(9, 8, 128, "bf16", 64), where),
            pool_copy(pool(9, 8, 128, "key_fp8", 0), where),
        )
        frequencies, norm = torch.logspace(0, -4, 32).to(where), torch.ones(128, device=where)
        angles = rope_angles(index.positions_T, frequencies)
        tokens = index.num_tokens
        query, row = randn(tokens, 4, 128).bfloat16().to(where), randn(tokens, 128).bfloat16().to(where)
        query, chunk = attention_inputs(query, row, norm, angles, 1e-6, ring, index, simulate=True)
        if not single:
            insert_window(chunk, ring, index)
        value, score, ape = (randn(*shape).to(where) for shape in ((tokens, 256), (tokens, 256), (4, 256)))
        state = (torch.zeros(3, 4, 2, 256, device=where), torch.zeros(3, 4, 2, 128, device=where))
        for pool_ in (entries, keys):
            target = EntryTarget(norm, frequencies, pool_, 1e-6, True)
            compress_overlapping(value, score, ape, *state, index, target, torch.bfloat16)
        pending = torch.zeros(3, 3, 128, device=where)
        target = EntryTarget(norm, frequencies, pool_copy(pool(9, 2, 128, "kv_fp8", 64), where), 1e-6, True)
        ape = randn(16, 128).to(where)
        compress_pending(value[:, :128], score[:, :128], ape, pending, index, target, torch.bfloat16)
        asked = index_query(randn(tokens, 2, 128).bfloat16().to(where), angles, keys, simulate=True)
        keys.data.copy_(torch.arange(128).expand_as(keys.data).byte())  # earlier passes' keys, as if written
        assert keys.scales is not None
        keys.scales.fill_(1.0)
        chosen = select_entries(asked, torch.ones(tokens, 2, device=where), keys, index, 4, 3)
        return torch.cat([part.float().flatten().cpu() for part in (query, ring.data, *state, pending, chosen >= 0)])

    got, expected = _twin_and_kernel(device, on_gpu, run)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_elementwise_launchers_run_the_kernels(device, on_gpu):
    def run(where):
        x = torch.linspace(-30, 30, 256).view(2, 128).bfloat16().to(where)
        angles = rope_angles(torch.arange(2, device=where), torch.logspace(0, -4, 32).to(where))
        normed = rms_norm(x, torch.ones(128, device=where), 1e-6)
        return torch.cat((normed, rope(normed.clone(), *angles, inverse=True), moe.swiglu(x, x, 10.0)))

    got, expected = _twin_and_kernel(device, on_gpu, run)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
