"""Routed experts with MXFP4 weights in Triton, from checkpoint layout: what runs where the CUDA kernels cannot.

Rows are e4m3 with scales per 128 channels (kernels/triton_quantize.py), weights e2m1 with scales per 32; products
run in bf16, where both are exact, and accumulate in float32 per 128 channels. A program owns one expert's tile of
weight rows and walks the expert's rows, so weights cross the memory bus once when an expert has at most ROWS rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import (
    INTERPRET,
    dot_operand,
    from_exponent_byte,
    power_of_two_scale,
    sigmoid,
    to_bf16,
    to_e4m3,
)
from kernels.triton_quantize import QuantizedRows, scale_stride


@triton.jit
def _weight_tile(codes, scales, row, stage, stride_codes, stride_scales, INTERPRET: tl.constexpr):
    """128 channels of the weight rows `row` [N] -> [N, 128] for tl.dot."""
    byte = tl.arange(0, 64)
    packed = tl.load(codes + row[:, None] * stride_codes + stage * 64 + byte[None, :]).to(tl.int32)
    both = tl.join(packed & 15, packed >> 4)  # [N, 64, 2]: even and odd channels
    # e2m1 bits in float32's exponent and mantissa: the value times 2^-126
    value = (((both & 8) << 28) | ((both & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    group = tl.load(scales + row[:, None] * stride_scales + stage * 4 + tl.arange(0, 4)[None, :])
    scaled = tl.reshape(value, (row.shape[0], 4, 32)) * from_exponent_byte(group)[:, :, None]
    return dot_operand(tl.reshape(scaled, (row.shape[0], 128)), INTERPRET)


@triton.jit
def _up_kernel(
    x, x_scale, codes, scales, offsets, route_weight, h, h_scale, channels, width, limit,
    stride_x, stride_xs, stride_codes, stride_scales, stride_h, stride_hs,
    ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    column = tile * 128 + tl.arange(0, 128)
    gate_row = expert * 2 * width + column
    inner = tl.arange(0, 128)
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        live = row < stop
        gate = tl.zeros((ROWS, 128), tl.float32)
        up = tl.zeros((ROWS, 128), tl.float32)
        for stage in range(channels // 128):
            rows = tl.load(x + row[:, None] * stride_x + stage * 128 + inner[None, :], mask=live[:, None], other=0.0)
            rows = dot_operand(rows, INTERPRET)
            factor = tl.load(x_scale + stage * stride_xs + row, mask=live, other=0.0)[:, None]
            w = _weight_tile(codes, scales, gate_row, stage, stride_codes, stride_scales, INTERPRET)
            gate += tl.dot(rows, tl.trans(w)) * factor
            w = _weight_tile(codes, scales, gate_row + width, stage, stride_codes, stride_scales, INTERPRET)
            up += tl.dot(rows, tl.trans(w)) * factor
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        weight = tl.load(route_weight + row, mask=live, other=0.0)[:, None]
        hidden = to_bf16(gate * sigmoid(gate) * up * weight, INTERPRET).to(tl.float32)
        scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(hidden), axis=1), 1e-4), 1.0 / 448.0)
        code = to_e4m3(hidden * (1.0 / scale)[:, None], INTERPRET)
        tl.store(h + row[:, None] * stride_h + column[None, :], code, mask=live[:, None])
        tl.store(h_scale + tile.to(tl.int64) * stride_hs + row, scale, mask=live)


@triton.jit
def _down_kernel(
    h, h_scale, codes, scales, offsets, y, channels, hidden,
    stride_h, stride_hs, stride_codes, stride_scales, stride_y,
    ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    column = tl.program_id(0) * 128 + tl.arange(0, 128)
    inner = tl.arange(0, 128)
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        live = row < stop
        total = tl.zeros((ROWS, 128), tl.float32)
        for stage in range(channels // 128):
            rows = tl.load(h + row[:, None] * stride_h + stage * 128 + inner[None, :], mask=live[:, None], other=0.0)
            factor = tl.load(h_scale + stage * stride_hs + row, mask=live, other=0.0)[:, None]
            w = _weight_tile(codes, scales, expert * hidden + column, stage, stride_codes, stride_scales, INTERPRET)
            total += tl.dot(dot_operand(rows, INTERPRET), tl.trans(w)) * factor
        tl.store(y + row[:, None] * stride_y + column[None, :], to_bf16(total, INTERPRET), mask=live[:, None])


def experts_up(
    rows: QuantizedRows, codes_EIC: Tensor, scales_EIG: Tensor, offsets_E: Tensor, route_weight_R: Tensor, limit: float,
    block_rows: int = 16,
) -> QuantizedRows:  # fmt: skip
    """codes uint8 [E, 2 I, D / 2] gate rows then up rows, scales E8M0 uint8 [E, 2 I, D / 32]; I a multiple of 128.
    -> silu(gate) * up * route_weight, e4m3 [R, I] with scales per 128."""
    num_rows, channels = rows.codes_RD.shape
    experts, width = codes_EIC.shape[0], codes_EIC.shape[1] // 2
    h = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=rows.codes_RD.device)
    h_scale = torch.empty(width // 128, scale_stride(num_rows), dtype=torch.float32, device=h.device)
    if num_rows:
        _up_kernel[(width // 128, experts)](
            rows.codes_RD, rows.scales_GR, codes_EIC, scales_EIG, offsets_E, route_weight_R, h, h_scale, channels,
            width, limit, rows.codes_RD.stride(0), rows.scales_GR.stride(0), codes_EIC.stride(1), scales_EIG.stride(1),
            h.stride(0), h_scale.stride(0), ROWS=block_rows, INTERPRET=INTERPRET,
            num_warps=4 if block_rows <= 32 else 8, num_stages=2,
        )  # fmt: skip
    return QuantizedRows(h, h_scale)


def experts_down(
    rows: QuantizedRows, codes_EDC: Tensor, scales_EDG: Tensor, offsets_E: Tensor, block_rows: int = 16
) -> Tensor:
    """codes uint8 [E, D, I / 2], scales E8M0 uint8 [E, D, I / 32]; D a multiple of 128 -> bf16 [R, D]."""
    num_rows, channels = rows.codes_RD.shape
    experts, hidden = codes_EDC.shape[:2]
    y = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=rows.codes_RD.device)
    if num_rows:
        _down_kernel[(hidden // 128, experts)](
            rows.codes_RD, rows.scales_GR, codes_EDC, scales_EDG, offsets_E, y, channels, hidden,
            rows.codes_RD.stride(0), rows.scales_GR.stride(0), codes_EDC.stride(1), scales_EDG.stride(1), y.stride(0),
            ROWS=block_rows, INTERPRET=INTERPRET, num_warps=4 if block_rows <= 32 else 8, num_stages=2,
        )  # fmt: skip
    return y
