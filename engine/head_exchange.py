"""Logits rows to all ranks that share the vocabulary head, and their columns back.

L rows of this rank, M the most of any rank, S ranks, D channels, N vocabulary rows a rank.
"""

from __future__ import annotations

from torch import Tensor

from engine.parallel import Agreement
from engine.rank_group import RankGroup


class HeadExchange:
    """`model.lm_head.HeadParallel`."""

    def __init__(self, group: RankGroup, agreement: Agreement) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group
        self._agreement = agreement

    def gather_rows(self, x_LD: Tensor) -> Tensor:
        num_rows, hidden = x_LD.shape
        mine = x_LD.new_zeros(max(num_rows, self._agreement.plan.max_logits), hidden)
        mine[:num_rows] = x_LD
        everybody = x_LD.new_empty(self.size * mine.shape[0], hidden)
        self._group.all_gather(everybody, mine).wait()
        return everybody

    def return_columns(self, mine_XN: Tensor, num_rows: int) -> Tensor:
        columns = mine_XN.new_empty(mine_XN.shape)
        self._group.all_to_all(columns, mine_XN.contiguous()).wait()
        by_rank = columns.unflatten(0, (self.size, -1))  # [S, M, N]
        return by_rank.transpose(0, 1).flatten(1)[:num_rows]
