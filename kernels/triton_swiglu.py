"""Clamped SwiGLU in Triton (specification: kernels.moe.swiglu_ref). Bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import INTERPRET, power_of_two_scale, sigmoid, to_bf16, to_e4m3
from kernels.triton_quantize import QuantizedRows, scale_stride

BLOCK = 1024


@triton.jit
def _gated(gate, up, inside, limit):
    g = tl.minimum(tl.load(gate, mask=inside, other=0.0).to(tl.float32), limit)
    u = tl.load(up, mask=inside, other=0.0).to(tl.float32)
    return g * sigmoid(g) * tl.minimum(tl.maximum(u, -limit), limit)


@triton.jit
def _swiglu_kernel(
    gate, up, output, width, limit, stride_gate, stride_up,
    BLOCK: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    h = _gated(gate + row * stride_gate + channel, up + row * stride_up + channel, inside, limit)
    tl.store(output + row * width + channel, to_bf16(h, INTERPRET) if BF16 else h, mask=inside)


@triton.jit
def _swiglu_quantized_kernel(
    gate, up, codes, scales, width, limit, stride_gate, stride_up, stride_scales,
    GROUPS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = channel < width
    h = _gated(gate + row * stride_gate + channel, up + row * stride_up + channel, inside, limit)
    h = to_bf16(h, INTERPRET).to(tl.float32)
    scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(h), axis=1), 1e-4), 1.0 / 448.0)
    tl.store(codes + row * width + channel, to_e4m3(h * (1.0 / scale)[:, None], INTERPRET), mask=inside)
    tl.store(scales + group.to(tl.int64) * stride_scales + row, scale, mask=group * 128 < width)


def swiglu_quantized_triton(gate_TI: Tensor, up_TI: Tensor, limit: float) -> QuantizedRows:
    """quantize_activations(swiglu_triton(gate, up, limit, bfloat16)), bit for bit; I a multiple of 128."""
    num_tokens, width = gate_TI.shape
    codes = torch.empty(num_tokens, width, dtype=torch.float8_e4m3fn, device=gate_TI.device)
    scales = torch.empty(width // 128, scale_stride(num_tokens), dtype=torch.float32, device=gate_TI.device)
    if codes.numel():
        groups = min(BLOCK // 128, triton.next_power_of_2(width // 128))
        _swiglu_quantized_kernel[(num_tokens, triton.cdiv(width, 128 * groups))](
            gate_TI, up_TI, codes, scales, width, limit, gate_TI.stride(0), up_TI.stride(0), scales.stride(0),
            GROUPS=groups, INTERPRET=INTERPRET, num_warps=max(1, groups // 2),
        )  # fmt: skip
    return QuantizedRows(codes, scales)


def swiglu_triton(gate_TI: Tensor, up_TI: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """gate and up bf16 or float32 [T, I], channels contiguous -> [T, I] in `dtype`, bfloat16 or float32."""
    num_tokens, width = gate_TI.shape
    output = torch.empty(num_tokens, width, dtype=dtype, device=gate_TI.device)
    if output.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        _swiglu_kernel[(num_tokens, triton.cdiv(width, block))](
            gate_TI, up_TI, output, width, limit, gate_TI.stride(0), up_TI.stride(0), BLOCK=block,
            BF16=dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=max(1, min(4, block // 256)),
        )  # fmt: skip
    return output
