"""RMS norm over the last dimension, in float32: x [..., D] any float dtype; weight [D] float32 or None; -> like x.

y = x * rsqrt(mean(x^2) + eps) * weight, rounded once to x's dtype. Also the per-head norm of queries (no weight).
Bound by memory: one read and one write of x.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kernels.activations import Activations
from kernels.dispatch import use_triton


def rms_norm_ref(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * inverse_rms(wide, eps)
    if weight is not None:
        normed *= weight
    return normed.to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept: float32 [..., D] -> [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, x.device), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()


@lru_cache(maxsize=8)
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The channels of x are contiguous, and so are all its dimensions but the first."""
    if use_triton(x):
        from kernels.triton_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return rms_norm_ref(x, weight, eps)


def rms_norm_activations(x_TD: Tensor, weight: Tensor | None, eps: float, *, quantize: bool) -> Activations:
    """rms_norm of [T, D]; with `quantize` also its e4m3 form, where that costs no pass of its own."""
    if quantize and use_triton(x_TD):
        from kernels.triton_norm import rms_norm_quantized_triton

        return rms_norm_quantized_triton(x_TD, weight, eps)
    return Activations(rms_norm(x_TD, weight, eps))
