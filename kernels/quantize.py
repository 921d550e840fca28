"""The released program's quantisers: power-of-two scales, e4m3 and e2m1 values, and their packed forms.

scale = 2^ceil(log2(amax * (1 / MAX))), taken from the exponent bits so that exact powers of two stay what they are.
FP8 (e4m3, MAX 448): amax floored at 1e-4. FP4 (e2m1, MAX 6): amax floored at 6 * 2^-126. Values round to nearest even.
E8M0 bytes are value = 2^(byte - 127). FP4 packs two codes a byte, the even column in the low nibble.

A simulation quantises and dequantises; its results are exact in bfloat16. Packing a simulated row is exact too: the
scale may come out one step lower, the values do not change.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FP8_MAX = 448.0
FP4_MAX = 6.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6 * 2.0**-126
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class QuantizedRows(NamedTuple):
    """e4m3 rows with a power-of-two scale per 128 channels, as GPU kernels pass them on."""

    codes_RD: Tensor
    scales_GR: Tensor
    """float32 [ceil(D / 128), R rounded up to 4]."""


@lru_cache(maxsize=4)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """float32 values of all 256 E8M0 bytes, all 256 e4m3 bytes, and the (low, high) nibbles of all 256 FP4 bytes."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    e8m0 = torch.ldexp(torch.ones(256, dtype=torch.float64, device=device), byte.int() - 127).float()
    e8m0[255] = torch.nan
    codes = torch.tensor([*_FP4_VALUES, *(-v for v in _FP4_VALUES)], device=device)
    fp4 = torch.stack((codes[(byte & 15).int()], codes[(byte >> 4).int()]), -1)
    return e8m0, byte.view(torch.float8_e4m3fn).float(), fp4


def decode_e8m0(scale_bytes: Tensor) -> Tensor:
    """uint8 -> float32 powers of two."""
    return _tables(scale_bytes.device)[0][scale_bytes.int()]


def decode_e4m3(codes: Tensor) -> Tensor:
    """uint8 -> float32."""
    return _tables(codes.device)[1][codes.int()]


def decode_fp4(packed: Tensor) -> Tensor:
    """uint8 [..., K / 2] -> float32 [..., K]."""
    return _tables(packed.device)[2][packed.int()].flatten(-2)


def scale_bytes_of(amax: Tensor, maximum: float) -> Tensor:
    """float32 (floored) maxima -> uint8 E8M0 bytes of 2^ceil(log2(amax / maximum))."""
    bits = (amax * torch.tensor(1.0 / maximum, dtype=torch.float32, device=amax.device)).view(torch.int32)
    return ((bits + 0x7FFFFF) >> 23).to(torch.uint8)


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., K] -> float32 [..., ceil(K / block), block], zero-padded."""
    rest = -x.shape[-1] % block
    wide = x.float()
    if rest:
        wide = functional.pad(wide, (0, rest))
    return wide.unflatten(-1, (-1, block))


def quantize_fp8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (e4m3 codes uint8 [..., K], E8M0 bytes uint8 [..., ceil(K / block)])."""
    blocks = _blocks(x, block)
    scales = scale_bytes_of(blocks.abs().amax(-1).clamp_(min=FP8_AMAX_FLOOR), FP8_MAX)
    scaled = (blocks / decode_e8m0(scales)[..., None]).clamp_(-FP8_MAX, FP8_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten(-2)[..., : x.shape[-1]], scales


def dequantize_fp8(codes: Tensor, scales: Tensor, block: int) -> Tensor:
    """Inverse of quantize_fp8, float32."""
    rest = -codes.shape[-1] % block
    padded = functional.pad(codes, (0, rest)) if rest else codes
    values = decode_e4m3(padded).unflatten(-1, (-1, block)) * decode_e8m0(scales)[..., None]
    return values.flatten(-2)[..., : codes.shape[-1]]


def simulate_fp8_ref(x: Tensor, block: int) -> Tensor:
    """Quantise-dequantise, in x's dtype."""
    return dequantize_fp8(*quantize_fp8(x, block), block).to(x.dtype)


def _fp4_magnitudes(scaled_abs: Tensor) -> Tensor:
    """Codes 0..7 of magnitudes in 0..6; ties go to the even code."""
    a = scaled_abs
    above = (a > 0.25).to(torch.uint8)
    for holds in (a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0):
        above += holds
    return above


def quantize_fp4(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x [..., K], K a multiple of `block` -> (packed uint8 [..., K / 2], E8M0 bytes uint8 [..., K / block])."""
    blocks = x.float().unflatten(-1, (-1, block))
    scales = scale_bytes_of(blocks.abs().amax(-1).clamp_(min=FP4_AMAX_FLOOR), FP4_MAX)
    scaled = (blocks / decode_e8m0(scales)[..., None]).flatten(-2)
    codes = _fp4_magnitudes(scaled.abs()) | (torch.signbit(scaled).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales


def dequantize_fp4(packed: Tensor, scales: Tensor, block: int) -> Tensor:
    """Inverse of quantize_fp4, float32."""
    values = decode_fp4(packed).unflatten(-1, (-1, block)) * decode_e8m0(scales)[..., None]
    return values.flatten(-2)


def simulate_fp4_ref(x: Tensor, block: int) -> Tensor:
    """Quantise-dequantise, in x's dtype."""
    return dequantize_fp4(*quantize_fp4(x, block), block).to(x.dtype)


def simulate_fp8(x: Tensor, block: int) -> Tensor:
    return simulate_fp8_ref(x, block)


def simulate_fp4(x: Tensor, block: int) -> Tensor:
    return simulate_fp4_ref(x, block)


def quantize_fp8_tiles(weight: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (e4m3 codes uint8 [N, K], E8M0 bytes uint8 [ceil(N / tile), ceil(K / tile)]), a scale a tile."""
    rows, columns = weight.shape
    padded = functional.pad(weight.float(), (0, -columns % tile, 0, -rows % tile))
    tiles = padded.unflatten(0, (-1, tile)).unflatten(-1, (-1, tile))  # [n, tile, k, tile]
    scales = scale_bytes_of(tiles.abs().amax((1, 3)).clamp_(min=FP8_AMAX_FLOOR), FP8_MAX)
    scaled = (tiles / decode_e8m0(scales)[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scales


def dequantize_fp8_tiles(codes: Tensor, scales: Tensor, tile: int) -> Tensor:
    """Inverse of quantize_fp8_tiles, float32 [N, K]."""
    rows, columns = codes.shape
    expanded = decode_e8m0(scales).repeat_interleave(tile, 0)[:rows].repeat_interleave(tile, 1)[:, :columns]
    return decode_e4m3(codes) * expanded
