"""Tokens to the ranks that hold their experts and back, over gloo: everybody sees all and adds its experts' part.

T tokens of this rank, U tokens of all ranks, D channels, K experts a token, M the largest T of any rank.
"""

import torch
from torch import Tensor

from engine.lockstep import Lockstep, RankGroup


def expert_range(num_experts: int, rank: int, size: int) -> range:
    """The contiguous experts of one rank; sizes differ by at most one."""
    return range(num_experts * rank // size, num_experts * (rank + 1) // size)


class ExpertExchange:
    """`model.moe.ExpertParallel`. One dispatch and one combine per layer, in the same order on every rank.

    How many tokens each rank has is known from the step's agreement, so that one all-gather of equal shapes is enough.
    """

    def __init__(self, group: RankGroup, lockstep: Lockstep) -> None:
        self._group = group
        self._lockstep = lockstep

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = (x_TD, experts_TK, weights_TK)
        widths = [part.shape[1] * part.element_size() for part in parts]
        counts = self._lockstep.num_tokens
        mine = torch.zeros((max(counts), sum(widths)), dtype=torch.uint8)
        mine[: x_TD.shape[0]] = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        gathered = self._group.all_gather(mine)
        rows = torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])
        x, experts, weights = (
            piece.contiguous().view(part.dtype) for piece, part in zip(rows.split(widths, dim=1), parts, strict=True)
        )
        return x, experts, weights

    def combine(self, partial_UD: Tensor) -> Tensor:
        self._group.all_reduce(partial_UD)
        counts = self._lockstep.num_tokens
        start = sum(counts[: self._group.rank])
        return partial_UD[start : start + counts[self._group.rank]]
