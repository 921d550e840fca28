"""RMS norm over the last dimension, in float32: x [..., D] any float dtype; weight [D] float32 or None; -> like x.

y = x * rsqrt(mean(x^2) + eps) * weight, rounded once to x's dtype. Also the per-head norm of queries (no weight).
Bound by memory: one read and one write of x.
"""

from __future__ import annotations

from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    if weight is not None:
        normed *= weight
    return normed.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return rms_norm_ref(x, weight, eps)
