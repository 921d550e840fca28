"""What all layers of one forward pass share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.rope import rope_angles
from model.branch import IN_TURN, Branch


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardContext:
    """One pass over a batch."""

    token_ids: Tensor
    index: BatchIndex
    dtype: torch.dtype
    simulate: bool
    real_T: Tensor | None = None
    """bool: not padding; None: no token is."""
    branch: Branch = IN_TURN
    """For what may run beside the rest of a sublayer."""

    def angles(self, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, R / 2] of the new tokens; `frequencies` is one of the model's few tables."""
        key = ("token_angles", frequencies.data_ptr())
        return self.index.cached(key, lambda: rope_angles(self.index.positions_T, frequencies))
