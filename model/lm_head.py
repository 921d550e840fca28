"""The vocabulary projection, whole on every rank or with its rows shared out over the ranks of a group.

L logits rows, V vocabulary, D hidden, S ranks, N = ceil(V / S) vocabulary rows a rank. Shared out, a rank computes its
part of everybody's logits: every column is the same product as before, so no bit changes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels.wide_linear import wide_linear
from model.linear import Numerics


class HeadParallel(Protocol):
    """Moves rows between the ranks that share the head. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def gather_rows(self, x_LD: Tensor) -> Tensor:
        """-> everybody's rows, by rank: [S * M, D], M the most rows of any rank."""

    def return_columns(self, mine_XN: Tensor, num_rows: int) -> Tensor:
        """This rank's columns of everybody's logits [S * M, N] -> all columns of its own: [num_rows, S * N]."""


class LmHead:
    """x W^T with float32 products (kernels.wide_linear); W stored [V, D]."""

    def __init__(self, vocab_size: int, numerics: Numerics, parallel: HeadParallel | None = None) -> None:
        self._vocab_size = vocab_size
        self._device, self._dtype = numerics.device, numerics.wide
        self._parallel = parallel
        self.value: Tensor
        """[V, D], or [N, D]: this rank's rows, with zeros behind the last rank's."""

    def load(self, weight: Tensor, scale: Tensor | None) -> None:
        """Takes this rank's rows of the checkpoint's tensor."""
        assert scale is None, "the head is not quantised"
        if self._parallel is None:
            self.value = weight.to(self._device, self._dtype)
            return
        count = -(-self._vocab_size // self._parallel.size)
        mine = weight[self._parallel.rank * count : (self._parallel.rank + 1) * count]
        self.value = torch.zeros(count, weight.shape[1], dtype=self._dtype, device=self._device)
        self.value[: mine.shape[0]].copy_(mine)

    def __call__(self, x_LD: Tensor) -> Tensor:
        """[L, D] activation dtype -> float32 [L, V]."""
        if self._parallel is None:
            return wide_linear(x_LD, self.value)
        everybody = self._parallel.gather_rows(x_LD)
        logits = self._parallel.return_columns(wide_linear(everybody, self.value), x_LD.shape[0])
        return logits[:, : self._vocab_size]
