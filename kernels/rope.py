"""Interleaved rotary embedding of the last channels: x [T, ..., D], cos and sin [T, R / 2] float32, R <= D; -> like x.

Pairs are (D - R + 2k, D - R + 2k + 1): (a, b) -> (a cos - b sin, b cos + a sin) in float32, rounded once to x's dtype;
`inverse` rotates by the negative angle. Angles are the float32 product of position and frequency, as in every
implementation of the model, although near a million tokens that product carries 0.03 rad of rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """positions int [T], frequencies float32 [R / 2] -> cos, sin float32 [T, R / 2]."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    half = cos.shape[-1]
    plain = x.shape[-1] - 2 * half
    shape = (cos.shape[0], *([1] * (x.dim() - 2)), half)
    cos, sin = cos.view(shape), sin.view(shape)
    pairs = x[..., plain:].float().unflatten(-1, (half, 2))
    a, b = pairs.unbind(-1)
    if inverse:
        rotated = torch.stack((a * cos + b * sin, b * cos - a * sin), -1)
    else:
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((x[..., :plain], rotated.flatten(-2).to(x.dtype)), -1)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    return rope_ref(x, cos, sin, inverse=inverse)
