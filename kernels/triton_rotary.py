"""Rotation of heads: in place, or back with quantisation.

T tokens, H heads, D channels (a power of two), the last R of them rotary; cos, sin float32 [T, R / 2].

rotate_in_place: the rotation of the twins' rope, reading and writing the rotary channels alone.
inverse_rope_quantize: the rotation back, rounded, then e4m3 with a scale per 128 channels, as the FP8 output projection
takes it (rope and quantize_fp8 of the twins). Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import INTERPRET, power_of_two_scale, to_bf16, to_e4m3
from kernels.triton_quantize import GROUP, QuantizedRows, scale_stride
from kernels.triton_rows import rotate

TILE = 4096
"""Elements a program holds."""


@triton.jit
def _inverse_rope_quantize_kernel(
    x, cos, sin, codes, scales, num_heads, stride_x, stride_scales,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    head, channel = first + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    inside = (head < num_heads)[:, None]
    value = tl.load(x + token * stride_x + head[:, None] * WIDTH + channel[None, :], mask=inside, other=0.0)
    value = rotate(value.to(tl.float32), cos, sin, token, ROPE, True)
    if BF16:
        value = to_bf16(value, INTERPRET).to(tl.float32)
    groups: tl.constexpr = HEADS * WIDTH // 128
    blocks = tl.reshape(value, (groups, 128))
    scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(blocks), axis=1), 1e-4), 1.0 / 448.0)
    code = tl.reshape(to_e4m3(blocks * (1.0 / scale)[:, None], INTERPRET), (HEADS, WIDTH))
    tl.store(codes + (token * num_heads + head[:, None]) * WIDTH + channel[None, :], code, mask=inside)
    group = first * (WIDTH // 128) + tl.arange(0, groups)
    tl.store(scales + group.to(tl.int64) * stride_scales + token, scale, mask=group < num_heads * (WIDTH // 128))


@triton.jit
def _rotate_kernel(
    x, cos, sin, num_heads, width, stride_x,
    HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, INVERSE: tl.constexpr, BF16: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PAIRS)
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    if INVERSE:
        s = -s
    inside = (head < num_heads)[:, None] & (pair < HALF)[None, :]
    place = x + token * stride_x + head[:, None] * width + width - 2 * HALF + 2 * pair[None, :]
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)
    first, second = a * c - b * s, b * c + a * s
    tl.store(place, to_bf16(first, INTERPRET) if BF16 else first, mask=inside)
    tl.store(place + 1, to_bf16(second, INTERPRET) if BF16 else second, mask=inside)


def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    """x bf16 or float32 [T, ..., D], contiguous but for its first dimension -> x."""
    num_tokens, width = x.shape[0], x.shape[-1]
    if not x.numel():
        return x
    if not x[0].is_contiguous():
        raise ValueError(f"x {list(x.shape)} with strides {list(x.stride())}: heads must be contiguous")
    num_heads, half = x[0].numel() // width, cos.shape[1]
    pairs = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(num_heads), max(1, TILE // (4 * pairs)))
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x, cos, sin, num_heads, width, x.stride(0), HEADS=heads, HALF=half, PAIRS=pairs, INVERSE=inverse,
        BF16=x.dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=2,
    )  # fmt: skip
    return x


def _check(x_THD: Tensor, cos: Tensor) -> tuple[int, int]:
    """(rotary channels, heads of a program)."""
    width, rotary = x_THD.shape[2], 2 * cos.shape[1]
    if width & (width - 1) or width < GROUP or rotary > width:
        raise ValueError(f"head width {width}, {rotary} of it rotary: the kernels need a power of two from {GROUP}")
    return rotary, max(1, min(TILE // width, triton.next_power_of_2(x_THD.shape[1])))


def inverse_rope_quantize(x_THD: Tensor, cos: Tensor, sin: Tensor) -> QuantizedRows:
    """x bf16 or float32 [T, H, D], heads contiguous -> rows [T, H D] for triton_fp8_gemm.fp8_product."""
    rotary, heads = _check(x_THD, cos)
    num_tokens, num_heads, width = x_THD.shape
    codes = torch.empty(num_tokens, num_heads * width, dtype=torch.float8_e4m3fn, device=x_THD.device)
    shape = (num_heads * width // GROUP, scale_stride(num_tokens))
    scales = torch.empty(shape, dtype=torch.float32, device=x_THD.device)
    if num_tokens:
        _inverse_rope_quantize_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
            x_THD, cos, sin, codes, scales, num_heads, x_THD.stride(0), scales.stride(0), HEADS=heads, WIDTH=width,
            ROPE=rotary, BF16=x_THD.dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=4,
        )  # fmt: skip
    return QuantizedRows(codes, scales)
