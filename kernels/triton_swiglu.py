"""Clamped SwiGLU in Triton (specification: kernels.moe.swiglu_ref). Bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import INTERPRET, sigmoid, to_bf16

BLOCK = 1024


@triton.jit
def _swiglu_kernel(
    gate, up, output, width, limit, stride_gate, stride_up,
    BLOCK: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    g = tl.load(gate + row * stride_gate + channel, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + channel, mask=inside, other=0.0).to(tl.float32)
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit)
    h = g * sigmoid(g) * u
    tl.store(output + row * width + channel, to_bf16(h, INTERPRET) if BF16 else h, mask=inside)


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
