"""The compressors of a layer: float32 projections of the sublayer's input, then the state update and new entries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.compressor import EntryTarget, compress_overlapping, compress_pending
from kernels.packed_rows import PackedRows
from kernels.row_linear import row_linear
from model.context import ForwardContext
from model.linear import Numerics, Weight, WeightHolder
from model.state import OverlapState


class _Compressor:
    def __init__(self, frequencies: Tensor, eps: float, numerics: Numerics) -> None:
        self._frequencies, self._eps = frequencies, eps
        self.ape, self.wkv, self.wgate, self.norm = (Weight(torch.float32, numerics) for _ in range(4))

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield f"{prefix}.ape", self.ape
        yield f"{prefix}.wkv.weight", self.wkv
        yield f"{prefix}.wgate.weight", self.wgate
        yield f"{prefix}.norm.weight", self.norm

    def _project(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        wide = x_TD.float()
        return row_linear(wide, self.wkv.value), row_linear(wide, self.wgate.value)

    def _target(self, pool: PackedRows, context: ForwardContext) -> EntryTarget:
        return EntryTarget(self.norm.value, self._frequencies, pool, self._eps, context.simulate)


class OverlapCompressor(_Compressor):
    """CSA: entries from two neighbouring blocks of four; also makes the indexer's keys."""

    def __call__(self, x_TD: Tensor, state: OverlapState, pool: PackedRows, context: ForwardContext) -> None:
        value, score = self._project(x_TD)
        compress_overlapping(
            value, score, self.ape.value, state.partial, state.overlap,
            context.index, self._target(pool, context), context.dtype,
        )  # fmt: skip


class PendingCompressor(_Compressor):
    """HCA: one entry per block, summed online."""

    def __call__(self, x_TD: Tensor, pending: Tensor, pool: PackedRows, context: ForwardContext) -> None:
        value, score = self._project(x_TD)
        compress_pending(
            value, score, self.ape.value, pending, context.index, self._target(pool, context), context.dtype
        )
