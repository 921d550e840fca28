"""FP8 block products against dequantised float32 ones."""

from __future__ import annotations

import pytest
import torch

from kernels.fp8_gemm import fp8_gemm, fp8_gemm_ref
from kernels.gpu_fp8_gemm import (
    HEAD_TILES,
    TILES,
    HeadFinish,
    Tile,
    fp8_gemm_gpu,
    fp8_product_gpu,
    launch_hopper,
    tile_for,
)
from kernels.quantize import decode_e8m0, dequantize_fp8_tiles, quantize_fp8, quantize_fp8_tiles
from kernels.query_heads import query_heads
from kernels.rms_norm import rms_norm_ref
from kernels.rope import rope_angles, rope_ref
from kernels.triton_fp8_gemm import fp8_product
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
    got = fp8_gemm_gpu(x, codes, scales)
    expected = fp8_gemm_ref(x.float(), codes, scales)
    assert got.dtype == torch.bfloat16
    assert _relative(got, expected) < 3e-3


def test_float32_products_match_to_the_accuracy_of_their_sums(generator, device):
    codes, scales = _weight(generator, device, 64, 512)
    x = torch.randn(9, 512, generator=generator, device=device)
    limit = 5e-4 if x.is_cuda else 2e-5  # FP8 tensor cores add with fewer bits than float32
    assert _relative(fp8_gemm_gpu(x, codes, scales), fp8_gemm_ref(x, codes, scales)) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
def test_a_row_has_the_same_bits_alone_and_among_many(generator, device, groups):
    codes, scales = _weight(generator, device, 256, 640)
    x = torch.randn(70, groups * 640, generator=generator, device=device).bfloat16()
    many = fp8_product(quantize_activations(x), codes, scales, torch.float32, groups)
    for rows in (1, 20, 64):
        few = fp8_product(quantize_activations(x[:rows]), codes, scales, torch.float32, groups)
        assert torch.equal(few, many[:rows])


@pytest.mark.parametrize("rows", [1, 40, 70])
def test_grouped_products_keep_groups_apart(generator, device, rows):
    groups, channels, rank = 3, 256, 128
    codes, scales = _weight(generator, device, groups * rank, channels)
    x = torch.randn(rows, groups, channels, generator=generator, device=device).bfloat16()
    got = fp8_product_gpu(quantize_activations(x.flatten(1)), codes, scales, x.dtype, groups)
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


@pytest.mark.parametrize("rows", [1, 64, 65, 300, 1025, 16384])
@pytest.mark.parametrize(("outputs", "groups"), [(128, 1), (1536, 1), (32768, 1), (8192, 8), (1024, 8)])
@pytest.mark.parametrize("codes", [False, True])
def test_a_tile_fits_every_product_of_whole_blocks(rows, outputs, groups, codes):
    tile = tile_for(rows, outputs, groups, 132, codes=codes)
    assert outputs // groups % (tile.outputs * tile.cluster) == 0
    assert tile.outputs >= 128 or not codes
    assert tile.rows == 64 or rows > 64


def _hopper(rows, codes, scales, groups, tile, **result):
    """Values, or codes with `code_scale`, into a poisoned output with rows to spare."""
    count, coded = rows.codes_RD.shape[0], "code_scale" in result
    shape, poison = (count + 2, codes.shape[0]), 0xFF if coded else torch.nan
    y = torch.full(shape, poison, dtype=torch.uint8 if coded else torch.bfloat16, device=codes.device)
    launch_hopper(tile, rows, codes, scales, groups, y[:count], **result)
    assert bool((y[count:] == 0xFF).all() if coded else y[count:].isnan().all())
    return y[:count]


HOPPER_SHAPES = [
    (1, 512, 128, 1),
    (65, 512, 384, 2),
    (130, 1536, 1920, 1),
    (300, 2048, 1024, 4),
    (70, 1024, 4096, 8),
    (64, 512, 8192, 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "outputs", "channels", "groups"), HOPPER_SHAPES)
def test_every_tile_of_the_hopper_kernel_gives_the_same_bits(generator, device, rows, outputs, channels, groups):
    codes, scales = _weight(generator, device, outputs, channels)
    x = torch.randn(rows, groups * channels, generator=generator, device=device).bfloat16()
    quantised = quantize_activations(x)
    expected = fp8_product(quantised, codes, scales, torch.float32, groups)
    first = _hopper(quantised, codes, scales, groups, Tile(64, 64))
    assert _relative(first, expected) < 3e-3
    two_steps = quantize_activations(first)
    for tile in TILES:
        if outputs // groups % (tile.outputs * tile.cluster):
            continue
        assert torch.equal(_hopper(quantised, codes, scales, groups, tile._replace(band=3)), first)
        if tile.outputs >= 128:
            code_scale = torch.full_like(two_steps.scales_GR, torch.nan)
            got = _hopper(quantised, codes, scales, groups, tile, code_scale=code_scale)
            assert torch.equal(got, two_steps.codes_RD.view(torch.uint8))
            assert torch.equal(code_scale[:, :rows], two_steps.scales_GR[:, :rows])


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "outputs"), [(1, 512), (63, 1024), (129, 32768), (600, 2048)])
def test_heads_are_finished_on_the_way_as_in_two_steps(generator, device, rows, outputs):
    codes, scales = _weight(generator, device, outputs, 1024)
    quantised = quantize_activations(torch.randn(rows, 1024, generator=generator, device=device).bfloat16())
    positions = torch.randint(0, 1 << 20, (rows,), generator=generator, device=device)
    angles = rope_angles(positions, 10000.0 ** -(torch.arange(32, device=device) / 32))
    plain = _hopper(quantised, codes, scales, 1, Tile(64, 64)).unflatten(-1, (-1, 512))
    expected = rope_ref(rms_norm_ref(plain, None, 1e-6), *angles).flatten(1)
    got = [_hopper(quantised, codes, scales, 1, tile, finish=HeadFinish(angles, 1e-6)) for tile in HEAD_TILES]
    assert torch.equal(*got)
    assert _relative(got[0], expected) < 1e-3
    assert float((got[0] == expected).float().mean()) > 0.99  # the sum of squares has another order


@pytest.mark.parametrize("rows", [0, 3])
def test_heads_that_no_kernel_finishes_are_the_plain_product(generator, device, rows):
    codes, scales = _weight(generator, device, 256, 128)
    x = torch.randn(rows, 128, generator=generator, device=device).bfloat16()
    angles = rope_angles(torch.arange(rows, device=device), torch.ones(32, device=device))
    heads = query_heads(x, codes, scales, 128, angles, 1e-6)
    assert not heads.finished
    assert torch.equal(heads.values_THD.flatten(1), fp8_gemm(x, codes, scales))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_heads_of_512_are_finished_in_any_form_of_the_latent(generator, device, rows):
    codes, scales = _weight(generator, device, 1024, 256)
    x = torch.randn(rows, 256, generator=generator, device=device).bfloat16()
    angles = rope_angles(torch.arange(rows, device=device), torch.ones(32, device=device))
    plain, quantised = (query_heads(form, codes, scales, 512, angles, 1e-6) for form in (x, quantize_activations(x)))
    assert plain.finished
    assert quantised.finished
    assert plain.values_THD.shape == (rows, 2, 512)
    assert torch.equal(plain.values_THD, quantised.values_THD)
