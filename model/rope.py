"""Rotary frequencies of the two kinds of layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig


def plain_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2k / dim), float32 [dim / 2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def layer_frequencies(config: ModelConfig, layer: int) -> Tensor:
    """float32 [qk_rope_head_dim / 2], used by everything in the layer: queries, window rows, entries, index keys.

    Window-only layers rotate plainly. Layers that compress use their own theta and YaRN ("NTK by parts"): a frequency
    that turns less than beta_slow times within the original context is divided by the factor, one that turns more than
    beta_fast times is kept, with a linear ramp between. Magnitudes are not scaled.
    """
    dim = config.qk_rope_head_dim
    if config.layer_kind(layer) == "swa":
        return plain_frequencies(dim, config.rope_theta)
    theta, scaling = config.compress_rope_theta, config.rope_scaling
    frequencies = plain_frequencies(dim, theta)
    if scaling is None:
        return frequencies

    def channel(turns: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
