"""First half of the output projection: heads rotated back, then one low-rank block per group of heads.

T tokens, H heads of D channels, G groups; x [T, H, D], weight [G R, H D / G] -> [T, G R]. Outputs [g R, (g + 1) R) see
the heads of group g. Angles (cos, sin) as in kernels.rope. In the activation dtype, or as W8A8 (kernels.fp8_gemm) on
rotated heads. Bound by the read of the weight at decode, by the tensor cores at prefill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.fp8_gemm import fp8_gemm_ref
from kernels.quantize import QuantizedRows, simulate_fp8
from kernels.rope import rope, rope_ref
from kernels.row_linear import row_linear

BLOCK = 128


def grouped_output_ref(x_TGC: Tensor, weight_GRC: Tensor) -> Tensor:
    return torch.cat([row_linear(x_TGC[:, group], weight) for group, weight in enumerate(weight_GRC)], -1)


def grouped_output(
    x_THD: Tensor, angles: tuple[Tensor, Tensor], weight_NC: Tensor, *, simulate: bool = False
) -> Tensor:
    """x and weight in the activation dtype; x is overwritten. simulate: round rotated heads as W8A8 does."""
    groups = x_THD.shape[1] * x_THD.shape[2] // weight_NC.shape[1]
    x = rope(x_THD, *angles, inverse=True).reshape(-1, groups, weight_NC.shape[1])
    if simulate:
        x = simulate_fp8(x, BLOCK)
    weight = weight_NC.unflatten(0, (groups, -1))
    if not x.is_cuda:
        return grouped_output_ref(x, weight)
    output = torch.empty(x.shape[0], groups, weight.shape[1], dtype=x.dtype, device=x.device)
    torch.bmm(x.transpose(0, 1), weight.mT, out=output.transpose(0, 1))
    return output.flatten(1)


def grouped_output_fp8_ref(x_THD: Tensor, angles: tuple[Tensor, Tensor], codes_NC: Tensor, scales_nc: Tensor) -> Tensor:
    """N / G a multiple of 128."""
    groups = x_THD.shape[1] * x_THD.shape[2] // codes_NC.shape[1]
    x = rope_ref(x_THD, *angles, inverse=True).reshape(-1, groups, codes_NC.shape[1])
    blocks = zip(codes_NC.chunk(groups), scales_nc.chunk(groups), strict=True)
    return torch.cat([fp8_gemm_ref(x[:, group], *block) for group, block in enumerate(blocks)], -1)


def grouped_output_fp8(
    x_THD: Tensor | QuantizedRows, angles: tuple[Tensor, Tensor], codes_NC: Tensor, scales_nc: Tensor
) -> Tensor | QuantizedRows:
    """codes uint8 [N, C]; scales uint8 [N / 128, C / 128], N / G, C multiples of 128. x may be overwritten, or
    rotated back and quantised already (kernels.sparse_attention.sparse_attention_for_fp8). -> like x, or, from a GPU
    kernel, bf16 values quantised for kernels.fp8_gemm."""
    if isinstance(x_THD, QuantizedRows) or use_triton(x_THD):
        from kernels.gpu_fp8_gemm import grouped_output_fp8_gpu

        return grouped_output_fp8_gpu(x_THD, angles, codes_NC, scales_nc)
    return grouped_output_fp8_ref(x_THD, angles, codes_NC, scales_nc)
