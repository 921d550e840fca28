"""Query heads from their latent: the projection in W8A8, RMS norm of each head without weight, the rotation.

T tokens, R latent channels, H heads of D channels, the last of them rotary: x [T, R], weight [H D, R] -> [T, H, D].
Norm and rotation round as rms_norm and rope do. Where the product's kernel does not do them on the way, that is left to
the pass that prepares attention (kernels.attention_inputs). Bound by the read of the weight at decode, by the write of
the heads and the FP8 tensor cores at prefill.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.fp8_gemm import fp8_gemm
from kernels.quantize import QuantizedRows


class QueryHeads(NamedTuple):
    """Heads on their way to attention."""

    values_THD: Tensor
    finished: bool = False
    """Normed and rotated."""


def query_heads(
    x_TR: Tensor | QuantizedRows,
    codes_NR: Tensor,
    scales_nr: Tensor,
    head_dim: int,
    angles: tuple[Tensor, Tensor],
    eps: float,
) -> QueryHeads:
    """x like kernels.fp8_gemm takes it; codes uint8 [H D, R], scales uint8 [H D / 128, R / 128]; angles (cos, sin)
    float32 [T, rotary / 2]."""
    bf16 = isinstance(x_TR, QuantizedRows) or x_TR.dtype == torch.bfloat16
    if codes_NR.is_cuda and bf16:
        from kernels.gpu_fp8_gemm import fits_heads, fp8_heads

        if fits_heads(codes_NR, head_dim, angles):
            return QueryHeads(fp8_heads(x_TR, codes_NR, scales_nr, head_dim, angles, eps), finished=True)
    return QueryHeads(fp8_gemm(x_TR, codes_NR, scales_nr).unflatten(-1, (-1, head_dim)))
