"""One forward pass's input: prefill chunks and single decode tokens of any requests, packed without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBatch:
    """T tokens of B requests; tokens of a request are consecutive and continue its state without a gap.

    T and B may be 0 (a rank that only takes part in expert communication)."""

    token_ids: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T]: context_len[b], context_len[b] + 1, ... for request b."""
    query_start: Tensor
    """int32 [B + 1]: first packed row of each request, then T."""
    context_len: Tensor
    """int32 [B]: tokens already in the state."""
    slot_ids: Tensor
    """int32 [B]."""
    page_table: Tensor
    """int32 [B, max_pages]: covers context and new tokens; entries beyond are never read."""
    logits_rows: Tensor
    """int64 [L]: packed rows whose logits are wanted."""
    token_request: Tensor | None = None
    """int32 [T]: the request of each token; None: made from query_start."""
    one_token_each: bool = False
    """Every request has exactly one token: a decode step."""
    spare_slot: int | None = None
    """Slot of padding requests, in a decode step that is padded; None: there are none."""

    def index(self, page_tokens: int) -> BatchIndex:
        """What the attention ops need to know of this batch."""
        owner = self.token_request
        if owner is None:
            request = torch.arange(self.slot_ids.shape[0], dtype=torch.int32, device=self.slot_ids.device)
            owner = request.repeat_interleave(self.query_start.diff(), output_size=self.token_ids.shape[0])
        return BatchIndex(
            token_request_T=owner,
            positions_T=self.positions,
            query_start=self.query_start,
            context_len_B=self.context_len,
            slot_ids_B=self.slot_ids,
            page_table=self.page_table,
            page_tokens=page_tokens,
            one_token_each=self.one_token_each,
        )
