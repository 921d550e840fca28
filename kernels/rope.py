"""Interleaved rotary embedding of the last channels, in place: x [T, ..., D], cos and sin [T, R / 2] float32, R <= D.

Pairs are (D - R + 2k, D - R + 2k + 1): (a, b) -> (a cos - b sin, b cos + a sin) in float32, rounded once to x's dtype;
`inverse` rotates by the negative angle. Angles are the float32 product of position and frequency, as in every
implementation of the model, although near a million tokens that product carries 0.03 rad of rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import use_triton


def rope_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """positions int [T], frequencies float32 [R / 2] -> cos, sin float32 [T, R / 2]."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    half = cos.shape[-1]
    rotary = x[..., x.shape[-1] - 2 * half :]
    turn = torch.complex(cos, -sin if inverse else sin).view(cos.shape[0], *([1] * (x.dim() - 2)), half)
    if x.dtype == torch.float32 and x.is_contiguous() and x.shape[-1] % 2 == 0:
        torch.view_as_complex(rotary.unflatten(-1, (half, 2))).mul_(turn)
        return x
    turned = torch.view_as_complex(rotary.float().unflatten(-1, (half, 2)).contiguous()) * turn
    rotary.copy_(torch.view_as_real(turned).flatten(-2))
    return x


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """-> x, rotated. Channels are contiguous, and so are heads."""
    if use_triton(x):
        from kernels.triton_rotary import rotate_in_place

        return rotate_in_place(x, cos, sin, inverse=inverse)
    return rope_ref(x, cos, sin, inverse=inverse)
