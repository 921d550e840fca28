"""Weights of the hyper-connections around a sublayer, and of the head that collapses the streams."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.hyper_connection import HyperWeights
from model.linear import HyperScale, Numerics, Weight, WeightHolder


class HyperConnection:
    """fn, base and scale of one sublayer (three scales) or of the head (one)."""

    def __init__(self, streams: int, numerics: Numerics, *, head: bool = False) -> None:
        self.fn, self.base = Weight(torch.float32, numerics), Weight(torch.float32, numerics)
        self.scale = Weight(torch.float32, numerics) if head else HyperScale(streams, numerics)

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield f"{prefix}_fn", self.fn
        yield f"{prefix}_base", self.base
        yield f"{prefix}_scale", self.scale

    @property
    def weights(self) -> HyperWeights:
        return HyperWeights(self.fn.value, self.base.value, self.scale.value)
