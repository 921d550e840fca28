"""RMS norm over the last dimension in Triton (specification: kernels.rms_norm.rms_norm_ref). Bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activations import Activations
from kernels.quantize import QuantizedRows
from kernels.triton_common import INTERPRET, power_of_two_scale, to_bf16, to_e4m3
from kernels.triton_quantize import GROUP, scale_stride


@triton.jit
def _norm_kernel(
    x, weight, output, codes, scales, width, eps, stride_x, stride_scales,
    BLOCK: tl.constexpr, WEIGHT: tl.constexpr, QUANTIZE: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    value = tl.load(x + row * stride_x + channel, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    if WEIGHT:
        value = value * tl.load(weight + channel, mask=inside, other=0.0)
    normed = to_bf16(value, INTERPRET) if BF16 else value
    tl.store(output + row * width + channel, normed, mask=inside)
    if QUANTIZE:
        groups = tl.reshape(normed.to(tl.float32), (BLOCK // 128, 128))
        scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-4), 1.0 / 448.0)
        code = to_e4m3(groups * (1.0 / scale)[:, None], INTERPRET)
        tl.store(codes + row * width + channel, tl.reshape(code, (BLOCK,)), mask=inside)
        group = tl.arange(0, BLOCK // 128)
        tl.store(scales + group.to(tl.int64) * stride_scales + row, scale, mask=group * 128 < width)


def _launch(x: Tensor, weight: Tensor | None, eps: float, quantize: bool) -> Activations:
    width = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, width).contiguous()
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes = scales = output
    quantized = None
    if quantize:
        codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(-(-width // GROUP), scale_stride(rows.shape[0]), dtype=torch.float32, device=x.device)
        quantized = QuantizedRows(codes, scales)
    if rows.numel():
        block = max(GROUP if quantize else 1, triton.next_power_of_2(width))
        _norm_kernel[(rows.shape[0],)](
            rows, output if weight is None else weight, output, codes, scales, width, eps, rows.stride(0),
            scales.stride(0), BLOCK=block, WEIGHT=weight is not None, QUANTIZE=quantize,
            BF16=x.dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return Activations(output, quantized)


def rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x bf16 or float32 [..., D]; weight float32 [D] or None -> like x, contiguous."""
    return _launch(x, weight, eps, False).plain


def rms_norm_quantized_triton(x_TD: Tensor, weight: Tensor | None, eps: float) -> Activations:
    """The same for [T, D], and the e4m3 form of the result, as kernels.triton_quantize makes it."""
    return _launch(x_TD, weight, eps, True)
