"""RMS norm, rotation in place, SwiGLU and wide products against their twins."""

from __future__ import annotations

import pytest
import torch

from kernels.moe import swiglu_ref
from kernels.rms_norm import rms_norm_ref
from kernels.rope import rope_angles, rope_ref
from kernels.triton_norm import rms_norm_quantized_triton, rms_norm_triton
from kernels.triton_quantize import quantize_activations
from kernels.triton_rotary import rotate_in_place
from kernels.triton_swiglu import swiglu_triton
from kernels.wide_linear import wide_linear, wide_linear_ref

DTYPES = [torch.bfloat16, torch.float32]


def _tolerance(dtype):
    return {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 100), (2, 4096)])
def test_rms_norm_of_parts_of_a_projection(generator, device, rows, width, weighted, dtype):
    x = (5 * torch.randn(rows, width + 8, generator=generator, device=device)).to(dtype)[:, 8:]
    weight = torch.rand(width, generator=generator, device=device) if weighted else None
    got, expected = rms_norm_triton(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6)
    torch.testing.assert_close(got, expected, **_tolerance(dtype))
    assert not rows or dtype == torch.float32 or float((got == expected).float().mean()) > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 128), (1, 1024), (6, 320), (5, 64)])
def test_a_norm_that_quantises_does_what_a_pass_of_its_own_would(generator, device, rows, width, dtype):
    x = (5 * torch.randn(rows, width + 8, generator=generator, device=device)).to(dtype)[:, 8:]
    weight = torch.rand(width, generator=generator, device=device)
    plain, quantized = rms_norm_quantized_triton(x, weight, 1e-6)
    torch.testing.assert_close(plain, rms_norm_triton(x, weight, 1e-6), **_tolerance(dtype))
    codes, scales = quantize_activations(plain)
    assert quantized is not None
    assert torch.equal(quantized.codes_RD.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(quantized.scales_GR[:, :rows], scales[:, :rows])


def test_rms_norm_of_heads(generator, device):
    x = torch.randn(3, 2, 64, generator=generator, device=device)
    torch.testing.assert_close(rms_norm_triton(x, None, 1e-6), rms_norm_ref(x, None, 1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("shape", [(0, 2, 64), (3, 5, 128), (2, 64, 512), (4, 96)])
def test_rotation_touches_the_last_channels_alone(generator, device, shape, inverse, dtype):
    x = torch.randn(*shape, generator=generator, device=device).to(dtype)
    angles = rope_angles(
        torch.arange(shape[0], device=device) * 1000, 10000.0 ** -(torch.arange(24, device=device) / 24)
    )
    expected = rope_ref(x.clone(), *angles, inverse=inverse)
    before = x[..., :-48].clone()
    got = rotate_in_place(x, *angles, inverse=inverse)
    assert got is x
    assert torch.equal(x[..., :-48], before)
    torch.testing.assert_close(x, expected, **_tolerance(dtype))


def test_heads_with_gaps_are_refused(device):
    with pytest.raises(ValueError, match="contiguous"):
        rotate_in_place(
            torch.zeros(2, 3, 8, device=device)[:, ::2], *torch.zeros(2, 2, 4, device=device), inverse=False
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 1), (3, 1100)])
def test_swiglu_clamps_and_rounds_once(generator, device, rows, width, dtype):
    both = (20 * torch.randn(rows, 2 * width, generator=generator, device=device)).bfloat16()
    gate, up = both.split(width, -1)
    got = swiglu_triton(gate, up, 10.0, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, swiglu_ref(gate, up, 10.0).to(dtype), **_tolerance(dtype))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_wide_products_keep_float32(generator, device, rows):
    x = torch.randn(rows, 64, generator=generator, device=device).bfloat16()
    weight = torch.randn(48, 64, generator=generator, device=device).bfloat16()
    got = wide_linear(x, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wide_linear_ref(x, weight), rtol=1e-5, atol=1e-4)
