"""FP8 block products against dequantised float32 ones."""

from __future__ import annotations

import pytest
import torch

from kernels.fp8_gemm import fp8_gemm_ref
from kernels.quantize import decode_e8m0, dequantize_fp8_tiles, quantize_fp8, quantize_fp8_tiles
from kernels.triton_fp8_gemm import _few_rows, fp8_gemm_triton, fp8_product, grouped_output_fp8
from kernels.triton_quantize import quantize_activations


def _relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def _weight(generator, device, outputs, channels):
    weight = torch.randn(outputs, channels, generator=generator, device=device)
    weight *= torch.randn(outputs, 1, generator=generator, device=device).exp()
    return quantize_fp8_tiles(weight, 128)


@pytest.mark.parametrize(("rows", "channels"), [(0, 128), (1, 128), (3, 200), (5, 1536), (2, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_become_the_released_codes_bit_for_bit(generator, device, rows, channels, dtype):
    x = torch.randn(rows, channels + 8, generator=generator, device=device).to(dtype)[:, :channels]
    x *= torch.logspace(-8, 8, channels, base=2, device=device).to(dtype)
    got = quantize_activations(x)
    codes, scales = quantize_fp8(x, 128)
    assert torch.equal(got.codes_RD.view(torch.uint8), codes)
    assert torch.equal(got.scales_GR[:, :rows].T, decode_e8m0(scales))


@pytest.mark.parametrize("rows", [0, 1, 17, 64, 65, 130])
@pytest.mark.parametrize(("outputs", "channels"), [(128, 128), (192, 384), (72, 208)])
def test_products_match_the_reference(generator, device, rows, outputs, channels):
    codes, scales = _weight(generator, device, outputs, channels)
    x = torch.randn(rows, channels, generator=generator, device=device).bfloat16()
    got = fp8_gemm_triton(x, codes, scales)
    expected = fp8_gemm_ref(x.float(), codes, scales)
    assert got.dtype == torch.bfloat16
    assert _relative(got, expected) < 3e-3


def test_float32_products_match_to_the_accuracy_of_their_sums(generator, device):
    codes, scales = _weight(generator, device, 64, 512)
    x = torch.randn(9, 512, generator=generator, device=device)
    limit = 5e-4 if x.is_cuda else 2e-5  # FP8 tensor cores add with fewer bits than float32
    assert _relative(fp8_gemm_triton(x, codes, scales), fp8_gemm_ref(x, codes, scales)) < limit


@pytest.mark.parametrize("split", [2, 4])
def test_split_products_match_and_leave_their_counters_at_zero(generator, device, split):
    codes, scales = _weight(generator, device, 128, 1024)
    rows = quantize_activations(torch.randn(20, 1024, generator=generator, device=device).bfloat16())
    weight = codes.view(torch.float8_e4m3fn)
    results = []
    for parts in (1, split, split):
        y = torch.full((20, 128), torch.nan, device=device)
        _few_rows(rows, weight, scales, y, 1, parts)
        results.append(y)
    assert _relative(results[1], results[0]) < 1e-5
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("rows", [1, 40, 70])
def test_grouped_products_keep_groups_apart(generator, device, rows):
    groups, channels, rank = 3, 256, 128
    codes, scales = _weight(generator, device, groups * rank, channels)
    x = torch.randn(rows, groups, channels, generator=generator, device=device).bfloat16()
    got = grouped_output_fp8(x, codes, scales)
    weight = dequantize_fp8_tiles(codes, scales, 128).view(groups, rank, channels)
    for group in range(groups):
        expected = fp8_gemm_ref(x[:, group].float(), *quantize_fp8_tiles(weight[group], 128))
        assert _relative(got[:, group * rank : (group + 1) * rank], expected) < 3e-3


def test_shapes_that_do_not_fit_are_refused(generator, device):
    codes, scales = _weight(generator, device, 128, 128)
    rows = quantize_activations(torch.randn(2, 256, generator=generator, device=device))
    with pytest.raises(ValueError, match="256 channels"):
        fp8_product(rows, codes, scales, torch.bfloat16)
    with pytest.raises(ValueError, match="grouped products need"):
        fp8_product(rows, codes, scales, torch.bfloat16, groups=2)
