"""Seeded random weights for any configuration: bounded activations, lively logits.

Each weight is drawn from its own generator, seeded by (seed, name), so it does not depend on which others are made.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from model.config import ModelConfig
from model.inventory import TensorSpec

LOGIT_SCALE = 3.0
"""Standard deviation of the logits, roughly: sampling differs from greedy, greedy does not repeat one token."""


def generator_of(name: str, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Where the numbers of `name` come from. Each kind of device draws others."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def random_weight(spec: TensorSpec, config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The values of one weight (not a scale) before quantisation: float32, or int64 for tid2eid.

    Packed FP4 weights come unpacked, [out, in]. They are drawn on `device`."""
    generator = generator_of(spec.name, seed, device)
    shape = (*spec.shape[:-1], 2 * spec.shape[-1]) if spec.dtype == "I8" else spec.shape
    leaf = spec.name.rpartition(".")[2]
    owner = spec.name.split(".")[-2] if "." in spec.name else ""

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * std

    if leaf == "tid2eid":
        return torch.rand(shape[0], config.n_routed_experts, generator=generator, device=device).topk(shape[1]).indices
    if "norm" in owner:
        return 1 + normal(0.1)
    if leaf.endswith("_scale"):
        return 1 + normal(0.1)
    if leaf.endswith("_base") or leaf == "attn_sink":
        return normal(1.0)
    if leaf == "ape":
        return normal(0.5)
    if leaf == "bias":
        return normal(0.05)
    if owner == "embed":
        return normal(1.0)
    gain = LOGIT_SCALE if owner == "head" else 1.0
    return normal(gain / math.sqrt(shape[-1]))
