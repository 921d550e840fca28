"""What the Triton kernels share: number formats by bit arithmetic, and the switch for Triton's CPU interpreter.

The interpreter computes bf16 dots wrongly and rounds float32 -> bf16 and -> e4m3 otherwise than the GPU, so kernels
take the constexpr INTERPRET: dots then run in float32, and casts round on the integer bits.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def power_of_two_scale(amax, inverse_max: tl.constexpr):
    """2^ceil(log2(amax * inverse_max)) on exponent bits; amax is floored by the caller."""
    bits = (amax * inverse_max).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def exponent_byte(scale):
    """E8M0 byte of a float32 power of two."""
    return (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def from_exponent_byte(byte):
    """float32 2^(byte - 127), byte > 0."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """float32; far below zero it stays the smallest normal numbers instead of overflowing on the way."""
    return 1.0 / (1.0 + tl.exp(-tl.maximum(x, -87.0)))


@triton.jit
def reciprocal(x, INTERPRET: tl.constexpr):
    """1 / x to one or two units in the last place, for normal x."""
    if INTERPRET:
        return 1.0 / x
    else:
        return libdevice.fast_dividef(1.0, x)


@triton.jit
def to_bf16(x, INTERPRET: tl.constexpr):
    """float32 -> bf16, to nearest even."""
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def dot_operand(x, INTERPRET: tl.constexpr):
    """bf16 on the GPU, float32 under the interpreter."""
    if INTERPRET:
        return x.to(tl.float32)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_e4m3(x, INTERPRET: tl.constexpr):
    """float32 of at most 448 -> e4m3, to nearest even. The interpreter's own cast mishandles carries and subnormals, so
    there the code is built: three mantissa bits rounded on the integer, or a multiple of 2^-9 below 2^-6."""
    if INTERPRET:
        magnitude = tl.abs(x)
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = ((magnitude + 24576.0) - 24576.0) * 512.0
        code = tl.where(magnitude < 0.015625, subnormal.to(tl.int32), normal)
        code |= (x.to(tl.int32, bitcast=True) >> 24) & 128
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)
