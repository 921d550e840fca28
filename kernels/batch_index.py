"""What every attention op must know about a packed batch: whose token it is, where it stands, where its state lies.

T tokens, B requests. Tokens of a request are consecutive; request b owns rows query_start[b] .. query_start[b + 1].

Padding, for captured decode steps of a fixed size, needs no case of its own in any kernel: a padding request has one
token at position 0, no context, a page-table row of zeros, and the spare slot behind the pool's last one. So it reads
nothing but its own row, closes no block, and all it writes goes to the spare slot, which several of them may share.
Entries of `page_table` beyond a request's own pages may be left over from other requests: valid ids, never to be used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchIndex:
    """Index tensors of one forward pass, on the device of the model."""

    token_request_T: Tensor
    """int32: the request of each token."""
    positions_T: Tensor
    """int64: absolute positions."""
    query_start: Tensor
    """int32 [B + 1]: first packed row of each request, then T."""
    context_len_B: Tensor
    """int32: tokens already in the state before this pass."""
    slot_ids_B: Tensor
    """int32: row of the slot pool."""
    page_table: Tensor
    """int32 [B, max_pages]: page of tokens [i * page_tokens, (i + 1) * page_tokens)."""
    page_tokens: int
    one_token_each: bool = False
    """Known to the host: every request has one token, T = B. Ops then write state in the launch that reads it."""
    _plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        return int(self.positions_T.shape[0])

    @property
    def num_requests(self) -> int:
        return int(self.slot_ids_B.shape[0])

    @property
    def end_len_B(self) -> Tensor:
        """Tokens in the state after this pass."""
        return self.cached("end_len", lambda: self.context_len_B + self.query_start.diff())

    def cached(self, key: Hashable, build: Callable[[], Plan]) -> Plan:
        """A derived index that the twins of several layers share within one pass."""
        if key not in self._plans:
            self._plans[key] = build()
        plan: Plan = self._plans[key]
        return plan

    def entry_location(self, request: Tensor, entry: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        """(page, row in the page) of compressed entries, elementwise over broadcastable int tensors."""
        per_page = self.page_tokens // ratio
        return self.page_table[request, entry // per_page], entry % per_page


def ranges(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenates the ranges [starts[b], starts[b] + counts[b]): returns (b of each element, the element), int64."""
    owner = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return owner, torch.arange(owner.shape[0], device=owner.device) - first[owner] + starts[owner]
