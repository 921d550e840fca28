"""RMS norm over the last dimension in Triton (specification: kernels.rms_norm.rms_norm_ref). Bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import INTERPRET, to_bf16


@triton.jit
def _norm_kernel(
    x, weight, output, width, eps, stride_x,
    BLOCK: tl.constexpr, WEIGHT: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    value = tl.load(x + row * stride_x + channel, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    if WEIGHT:
        value = value * tl.load(weight + channel, mask=inside, other=0.0)
    tl.store(output + row * width + channel, to_bf16(value, INTERPRET) if BF16 else value, mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x bf16 or float32 [..., D]; weight float32 [D] or None -> like x, contiguous."""
    width = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, width).contiguous()
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.numel():
        block = triton.next_power_of_2(width)
        _norm_kernel[(rows.shape[0],)](
            rows, output if weight is None else weight, output, width, eps, rows.stride(0), BLOCK=block,
            WEIGHT=weight is not None, BF16=x.dtype == torch.bfloat16, INTERPRET=INTERPRET,
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return output
