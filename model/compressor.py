"""The compressors of a layer: float32 projections of the sublayer's input, then the state update and new entries.

All compressors of a layer project the same input, so their matrices are one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.compressor import EntryTarget, compress_overlapping, compress_pending
from kernels.packed_rows import PackedRows
from model.context import ForwardContext
from model.linear import Numerics, StackedWeight, Weight, WeightHolder
from model.state import OverlapState


class Compressor:
    """Position biases and norm of one compressor; its projections are parts `first` and `first + 1` of the layer's."""

    def __init__(
        self, projections: StackedWeight, first: int, frequencies: Tensor, eps: float, numerics: Numerics
    ) -> None:
        self._projections, self._first = projections, first
        self._frequencies, self._eps = frequencies, eps
        self.ape, self.norm = Weight(torch.float32, numerics), Weight(torch.float32, numerics)

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield f"{prefix}.ape", self.ape
        yield f"{prefix}.wkv.weight", self._projections.part(self._first)
        yield f"{prefix}.wgate.weight", self._projections.part(self._first + 1)
        yield f"{prefix}.norm.weight", self.norm

    def _target(self, pool: PackedRows, context: ForwardContext) -> EntryTarget:
        return EntryTarget(self.norm.value, self._frequencies, pool, self._eps, context.simulate)


class OverlapCompressor(Compressor):
    """CSA: entries from two neighbouring blocks of four; also makes the indexer's keys."""

    def __call__(
        self, projected: tuple[Tensor, ...], state: OverlapState, pool: PackedRows, context: ForwardContext
    ) -> None:
        """projected: float32 outputs of the layer's compressor projections."""
        value, score = projected[self._first : self._first + 2]
        compress_overlapping(
            value, score, self.ape.value, state.partial, state.overlap,
            context.index, self._target(pool, context), context.dtype,
        )  # fmt: skip


class PendingCompressor(Compressor):
    """HCA: one entry per block, summed online."""

    def __call__(
        self, projected: tuple[Tensor, ...], pending: Tensor, pool: PackedRows, context: ForwardContext
    ) -> None:
        value, score = projected[self._first : self._first + 2]
        compress_pending(
            value, score, self.ape.value, pending, context.index, self._target(pool, context), context.dtype
        )
