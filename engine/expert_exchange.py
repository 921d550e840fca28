"""Tokens to the ranks that hold their experts and back: everybody sees all tokens and adds its experts' part.

T tokens of this rank, M the most of any rank, S ranks, D channels, K experts a token. A token's six experts lie on 3.3
of 4 ranks on average, so sending every token to all ranks costs a fifth more than sending it where it must go, and
needs no counts from a device: an all-gather of M rows per rank, then an all-to-all of partial sums, which every rank
adds up in the order of ranks, so that a token's bits do not depend on the batch. All sizes are known to the host before
the step, so a captured graph can hold the exchange as well as a step with prompts. Between CPU ranks the same calls go
over gloo.

Large steps go through the experts in parts. All are sent at once; while one is computed the next ones arrive and the
sums of the last one leave.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.parallel import Agreement
from engine.rank_group import Pending, RankGroup
from kernels.exchange_rows import RowFormat, add_sums, pack_rows, unpack_rows
from model.moe import ExpertCompute


class ExpertExchange:
    """`model.moe.ExpertParallel`. The same calls in the same order on every rank, also with zero tokens."""

    def __init__(
        self,
        group: RankGroup,
        agreement: Agreement,
        *,
        num_experts: int,
        quantised: bool,
        part_tokens: int,
        sums: torch.dtype = torch.float32,
    ) -> None:
        """quantised: send e4m3 rows, exact where the experts round their inputs so themselves.
        part_tokens: tokens per rank that go through the experts together.
        sums: dtype in which partial sums travel."""
        self._group = group
        self._agreement = agreement
        self._num_experts = num_experts
        self._quantised = quantised
        self._part_tokens = part_tokens
        self._sums = sums

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> InFlight:
        layout = RowFormat(x_TD.shape[1], experts_TK.shape[1], x_TD.dtype, self._quantised)
        parts = []
        for begin, end in parts_of(self._num_rows(x_TD.shape[0]), self._part_tokens):
            mine = slice(min(begin, x_TD.shape[0]), min(end, x_TD.shape[0]))
            rows = pack_rows(x_TD[mine], experts_TK[mine], weights_TK[mine], layout, end - begin, self._num_experts)
            gathered = rows.new_empty(self._group.size * rows.shape[0], rows.shape[1])
            parts.append((gathered, self._group.all_gather(gathered, rows), rows))
        return InFlight(self._group, layout, parts, self._sums)

    def _num_rows(self, num_tokens: int) -> int:
        """M. A captured step is padded to the same size on all ranks, and that is at least what was agreed."""
        return max(num_tokens, self._agreement.plan.max_tokens)


class InFlight:
    """Tokens on their way to the experts."""

    def __init__(
        self,
        group: RankGroup,
        layout: RowFormat,
        parts: Sequence[tuple[Tensor, Pending, Tensor]],
        sums: torch.dtype,
    ) -> None:
        self._group = group
        self._layout = layout
        self._parts = parts
        """Everybody's rows, their arrival, and this rank's own rows, which must live until then."""
        self._sums = sums

    def through(self, compute: ExpertCompute, shared_TD: Tensor) -> Tensor:
        """The sums over all experts of this rank's tokens, and the shared expert's output."""
        sums: list[tuple[Tensor, Pending, Tensor]] = []
        for gathered, arrival, _ in self._parts:
            arrival.wait()
            mine = compute(*unpack_rows(gathered, self._layout), dtype=self._sums)
            ours = torch.empty_like(mine)
            sums.append((ours, self._group.all_to_all(ours, mine), mine))
        total_TD, begin = torch.empty_like(shared_TD), 0
        for ours, arrival, _ in sums:
            arrival.wait()
            ranks_SMD = ours.unflatten(0, (self._group.size, -1))
            part = slice(begin, begin + ranks_SMD.shape[1])
            add_sums(ranks_SMD, shared_TD[part], total_TD[part])
            begin += ranks_SMD.shape[1]
        return total_TD


def parts_of(num_rows: int, part_rows: int) -> list[tuple[int, int]]:
    """[0, num_rows) in as few parts of at most `part_rows` as possible, of nearly equal size; one part if empty."""
    count = max(1, -(-num_rows // part_rows))
    bounds = [num_rows * part // count for part in range(count + 1)]
    return list(itertools.pairwise(bounds))
