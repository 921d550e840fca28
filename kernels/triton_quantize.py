"""Activations to e4m3 with a power-of-two scale per 128 channels, as FP8 products want them.

x [T, K] bf16 or float32 (last dimension contiguous) -> codes e4m3 [T, K], scales float32 [ceil(K / 128), T up to a
multiple of 4]: scales of one channel block lie together, as tiles read them. Specification: quantize.quantize_fp8.
Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize import QuantizedRows
from kernels.triton_common import INTERPRET, power_of_two_scale, to_e4m3

__all__ = ["GROUP", "QuantizedRows", "quantize_activations", "scale_stride"]

GROUP = 128


def scale_stride(num_rows: int) -> int:
    """Row stride of a scale table: the copy engine wants multiples of 16 bytes."""
    return max(4, -(-num_rows // 4) * 4)


@triton.jit
def _quantize_kernel(
    x, codes, scales, channels, stride_x, stride_codes, stride_scales, GROUPS: tl.constexpr, INTERPRET: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + row * stride_x + column, mask=column < channels, other=0.0).to(tl.float32)
    scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(value), axis=1), 1e-4), 1.0 / 448.0)
    code = to_e4m3(value * (1.0 / scale)[:, None], INTERPRET)
    tl.store(codes + row * stride_codes + column, code, mask=column < channels)
    tl.store(scales + group.to(tl.int64) * stride_scales + row, scale, mask=group * 128 < channels)


def quantize_activations(x_TK: Tensor) -> QuantizedRows:
    """x [T, K]; K a multiple of 16 if a CUDA kernel reads the result."""
    num_rows, channels = x_TK.shape
    groups = -(-channels // GROUP)
    codes = torch.empty(num_rows, channels, dtype=torch.float8_e4m3fn, device=x_TK.device)
    scales = torch.empty(groups, scale_stride(num_rows), dtype=torch.float32, device=x_TK.device)
    if num_rows and channels:
        block = min(8, triton.next_power_of_2(groups))
        _quantize_kernel[(num_rows, triton.cdiv(groups, block))](
            x_TK, codes, scales, channels, x_TK.stride(0), codes.stride(0), scales.stride(0),
            GROUPS=block, INTERPRET=INTERPRET,
        )  # fmt: skip
    return QuantizedRows(codes, scales)
