"""The grouped output projection: rotation back, quantisation, the product of each group, what the second half gets."""

from __future__ import annotations

import contextlib

import pytest
import torch

from kernels.dispatch import forced_triton
from kernels.gpu_fp8_gemm import fp8_product_codes, fp8_product_gpu
from kernels.grouped_output import grouped_output, grouped_output_fp8, grouped_output_fp8_ref
from kernels.quantize import QuantizedRows, decode_e4m3, dequantize_fp8_tiles, quantize_fp8, quantize_fp8_tiles
from kernels.rope import rope_angles
from kernels.triton_quantize import quantize_activations

GROUPS, HEADS, WIDTH = 2, 4, 128


@pytest.fixture
def on_gpu(device):
    """As on a GPU: CUDA tensors run kernels by themselves, CPU tensors when forced."""
    return contextlib.nullcontext() if device.type == "cuda" else forced_triton()


def _case(generator, device, tokens, dtype=torch.bfloat16, rank=128):
    x = torch.randn(tokens, HEADS, WIDTH, generator=generator, device=device).to(dtype)
    positions = torch.randint(0, 1 << 16, (tokens,), generator=generator, device=device)
    angles = rope_angles(positions, 10000.0 ** -(torch.arange(32, device=device) / 32))
    weight = torch.randn(GROUPS * rank, HEADS * WIDTH // GROUPS, generator=generator, device=device)
    return x, angles, *quantize_fp8_tiles(weight, 128)


def _values(rows: QuantizedRows):
    count = rows.codes_RD.shape[0]
    return decode_e4m3(rows.codes_RD.view(torch.uint8)) * rows.scales_GR[:, :count].T.repeat_interleave(128, 1)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_twin_in_fp8_is_the_plain_product_of_rounded_heads(generator, tokens):
    cpu = torch.device("cpu")
    x, angles, codes, scales = _case(torch.Generator().manual_seed(tokens), cpu, tokens, torch.float32)
    weight = dequantize_fp8_tiles(codes, scales, 128)
    expected = grouped_output(x.clone(), angles, weight, simulate=True)
    assert torch.equal(grouped_output_fp8_ref(x, angles, codes, scales), expected)
    assert expected.shape == (tokens, GROUPS * 128)


@pytest.mark.parametrize("tokens", [0, 1, 9, 70])
def test_the_kernels_hand_on_what_the_twin_computes(generator, device, on_gpu, tokens):
    x, angles, codes, scales = _case(generator, device, tokens)
    expected = grouped_output_fp8_ref(x.clone(), angles, codes, scales).float()
    with on_gpu:
        got = grouped_output_fp8(x, angles, codes, scales)
    assert isinstance(got, QuantizedRows)
    step = _values(QuantizedRows(*(part.to(device) for part in _quantised(expected))))
    assert float((_values(got) - step).norm()) <= 0.02 * float(step.norm())  # a rounding may fall the other way


def _quantised(x):
    codes, scales = quantize_fp8(x, 128)
    table = torch.zeros(scales.shape[1], max(4, -(-scales.shape[0] // 4) * 4), device=x.device)
    table[:, : scales.shape[0]] = torch.ldexp(torch.ones_like(table[:, : scales.shape[0]]), scales.T.int() - 127)
    return codes, table


def test_float32_activations_stay_as_they_are(generator, device, on_gpu):
    x, angles, codes, scales = _case(generator, device, 3, torch.float32)
    expected = grouped_output_fp8_ref(x.clone(), angles, codes, scales)
    with on_gpu:
        got = grouped_output_fp8(x, angles, codes, scales)
    assert isinstance(got, torch.Tensor)
    assert float((got - expected).norm()) <= 5e-4 * float(expected.norm())


@pytest.mark.parametrize("tokens", [1, 9, *(pytest.param(tokens, marks=pytest.mark.gpu) for tokens in (40, 129, 300))])
@pytest.mark.parametrize("rank", [128, 256])
def test_quantising_in_the_product_changes_no_bit(generator, device, tokens, rank):
    x, _, codes, scales = _case(generator, device, tokens, rank=rank)
    rows = quantize_activations(x.flatten(1))
    expected = quantize_activations(fp8_product_gpu(rows, codes, scales, torch.bfloat16, GROUPS))
    got = fp8_product_codes(rows, codes, scales, GROUPS)
    assert torch.equal(got.codes_RD.view(torch.uint8), expected.codes_RD.view(torch.uint8))
    assert torch.equal(got.scales_GR[:, :tokens], expected.scales_GR[:, :tokens])
