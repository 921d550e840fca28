"""Compressors: every `ratio` tokens become one KV entry (or index key); what the open block needs stays in the slot.

T new tokens, B requests, m ratio, C entry channels. Inputs are float32 projections of the sublayer's input. A token's
score gets ape[p mod m] added before it is used or stored. Block j covers positions m j .. m j + m - 1 and closes with
its last token, in the same pass, before attention, because that token may attend to it.

CSA (overlapping, m = 4): value and score [T, 2 C]; columns [0, C) are the A half, used by the NEXT block, [C, 2 C) the
B half, used by the token's own. Per channel, an entry is the softmax-weighted sum over 4 A rows of block j - 1 (none
for j = 0) and 4 B rows of block j.
    partial [slots, m, 2, 2 C]   (value, score) of the open block, row = p mod m; valid rows: p mod m < N mod m
    overlap [slots, m, 2, C]     A halves of the last closed block; valid once N >= m
HCA (m = 128): value and score [T, C]; an entry is the softmax-weighted sum over the block, held online:
    pending [slots, 3, C]        running maximum, sum of exp, weighted sum; valid while N mod m > 0

A closed entry is rounded to the activation dtype, RMS-normed, rotated at the block's first position, and stored in its
page, quantised. Source: DeepSeek-V4's released program. Bound by memory at decode, by the projections at prefill.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex, ranges
from kernels.dispatch import use_triton
from kernels.packed_rows import PackedRows, store_rows
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_angles


class EntryTarget(NamedTuple):
    """What happens to closed entries."""

    norm_C: Tensor
    """float32 RMS weight."""
    frequencies: Tensor
    """float32 rotary frequencies of the layer."""
    pool: PackedRows
    eps: float
    simulate: bool
    """Apply the released program's quantisation even where the pool's format would not."""


class _Entries(NamedTuple):
    """The blocks that close in this pass, E of them, request by request in order."""

    request_E: Tensor
    block_E: Tensor
    page_E: Tensor
    row_E: Tensor


class _OverlapPlan(NamedTuple):
    entries: _Entries
    own_Em: Tensor
    """Rows of the source table [T new | B m partial | B m overlap] that hold block j's tokens (their B half)."""
    previous_Em: Tensor
    """The same for block j - 1 (its A half)."""
    first_E: Tensor
    """Block 0, which has no block before it."""
    open_token: Tensor
    """New tokens that belong to a block still open after the pass."""
    open_slot: Tensor
    open_row: Tensor
    closed_request: Tensor
    """Requests that closed at least one block; their last one is the new overlap."""
    closed_Rm: Tensor


def _entries(index: BatchIndex, ratio: int) -> _Entries:
    first = index.context_len_B // ratio
    request, block = ranges(first, index.end_len_B // ratio - first)
    page, row = index.entry_location(request, block, ratio)
    return _Entries(request, block, page, row)


def _plan_overlap(index: BatchIndex, ratio: int) -> _OverlapPlan:
    entries = _entries(index, ratio)
    num_tokens, num_partial = index.num_tokens, index.num_requests * ratio
    within = torch.arange(ratio, device=index.positions_T.device)
    request = entries.request_E[:, None]
    context = index.context_len_B[request]
    new_row = index.query_start[request] - context
    state_row = num_tokens + request * ratio + within

    own_position = entries.block_E[:, None] * ratio + within
    own = torch.where(own_position >= context, new_row + own_position, state_row)
    in_overlap = context // ratio == entries.block_E[:, None]
    kept = torch.where(in_overlap, state_row + num_partial, state_row)
    previous_position = own_position - ratio
    previous = torch.where(previous_position >= context, new_row + previous_position, kept)

    open_from = (index.end_len_B // ratio * ratio)[index.token_request_T]
    open_token = (index.positions_T >= open_from).nonzero()[:, 0]
    closed_count = index.end_len_B // ratio - index.context_len_B // ratio
    closed = closed_count.nonzero()[:, 0]
    return _OverlapPlan(
        entries=entries,
        own_Em=own,
        previous_Em=previous,
        first_E=entries.block_E == 0,
        open_token=open_token,
        open_slot=index.slot_ids_B[index.token_request_T[open_token]],
        open_row=index.positions_T[open_token] % ratio,
        closed_request=closed,
        closed_Rm=own[closed_count.cumsum(0)[closed] - 1],
    )


def compress_overlapping_ref(
    value_T2C: Tensor,
    score_T2C: Tensor,
    ape_m2C: Tensor,
    partial: Tensor,
    overlap: Tensor,
    index: BatchIndex,
    target: EntryTarget,
    dtype: torch.dtype,
) -> None:
    ratio, channels = ape_m2C.shape[0], ape_m2C.shape[1] // 2
    plan = index.cached(("overlap", ratio), lambda: _plan_overlap(index, ratio))
    score = score_T2C + ape_m2C[index.cached(("phase", ratio), lambda: index.positions_T % ratio)]
    new = torch.stack((value_T2C, score), 1)  # [T, 2, 2C]
    if plan.closed_request.numel():
        state = partial[index.slot_ids_B].flatten(0, 1)  # [B m, 2, 2C]
        rows = torch.cat((new, state))
        a_rows = torch.cat((rows[..., :channels], overlap[index.slot_ids_B].flatten(0, 1)))
        previous = a_rows[plan.previous_Em]  # [E, m, 2, C]
        own = rows[plan.own_Em, :, channels:]
        first = plan.first_E[:, None, None]
        # Block 0 reads rows nobody wrote; whatever they hold must not survive a multiplication by a zero weight.
        values = torch.cat((previous[:, :, 0].masked_fill(first, 0.0), own[:, :, 0]), 1)
        scores = torch.cat((previous[:, :, 1].masked_fill(first, -torch.inf), own[:, :, 1]), 1)
        overlap[index.slot_ids_B[plan.closed_request]] = a_rows[plan.closed_Rm]
        _emit((scores.softmax(1) * values).sum(1).to(dtype), plan.entries, ratio, index, target)
    partial[plan.open_slot, plan.open_row] = new[plan.open_token]


class _PendingPlan(NamedTuple):
    slot_G: Tensor
    """G (request, block) pairs touched by this pass."""
    token_Gm: Tensor
    """New tokens of each, any valid row where absent."""
    absent_Gm1: Tensor
    continues_G1: Tensor
    """The block began in an earlier pass."""
    open_g: Tensor
    closed_g: Tensor
    entries: _Entries


def _plan_pending(index: BatchIndex, ratio: int) -> _PendingPlan:
    context, end = index.context_len_B, index.end_len_B
    first = context // ratio
    touched = torch.where(end > context, (end - 1) // ratio + 1 - first, 0)
    request, block = ranges(first, touched)
    position = block[:, None] * ratio + torch.arange(ratio, device=block.device)
    start, stop = context[request][:, None], end[request][:, None]
    absent = (position < start) | (position >= stop)
    token = (index.query_start[request][:, None] + position - start).masked_fill(absent, 0)
    closes = (block + 1) * ratio <= end[request]
    return _PendingPlan(
        slot_G=index.slot_ids_B[request],
        token_Gm=token,
        absent_Gm1=absent[..., None],
        continues_G1=(block * ratio < context[request])[:, None],
        open_g=(~closes).nonzero()[:, 0],
        closed_g=closes.nonzero()[:, 0],
        entries=_entries(index, ratio),
    )


def compress_pending_ref(
    value_TC: Tensor,
    score_TC: Tensor,
    ape_mC: Tensor,
    pending: Tensor,
    index: BatchIndex,
    target: EntryTarget,
    dtype: torch.dtype,
) -> None:
    ratio = ape_mC.shape[0]
    plan = index.cached(("pending", ratio), lambda: _plan_pending(index, ratio))
    if not plan.slot_G.numel():
        return
    score = score_TC + ape_mC[index.cached(("phase", ratio), lambda: index.positions_T % ratio)]
    old_max, old_sum, old_acc = pending[plan.slot_G].unbind(1)  # [G, C] each
    old_max = old_max.where(plan.continues_G1, -torch.inf)
    scores = score[plan.token_Gm].masked_fill(plan.absent_Gm1, -torch.inf)  # [G, m, C]
    new_max = torch.maximum(scores.amax(1), old_max)
    weights = (scores - new_max[:, None]).exp_()
    old_weight = (old_max - new_max).exp_()
    new_sum = weights.sum(1) + (old_sum * old_weight).where(plan.continues_G1, 0.0)
    new_acc = (weights * value_TC[plan.token_Gm]).sum(1) + (old_acc * old_weight).where(plan.continues_G1, 0.0)
    if plan.open_g.numel():
        pending[plan.slot_G[plan.open_g]] = torch.stack((new_max, new_sum, new_acc), 1)[plan.open_g]
    if plan.closed_g.numel():
        pooled = (new_acc / new_sum)[plan.closed_g]
        _emit(pooled.to(dtype), plan.entries, ratio, index, target)


def _emit(pooled_EC: Tensor, entries: _Entries, ratio: int, index: BatchIndex, target: EntryTarget) -> None:
    angles = index.cached(
        ("entry_angles", ratio, target.frequencies.data_ptr()),
        lambda: rope_angles(entries.block_E * ratio, target.frequencies),
    )
    rows = rope(rms_norm(pooled_EC, target.norm_C, target.eps), *angles)
    store_rows(target.pool, entries.page_E, entries.row_E, rows, simulate=target.simulate)


def compress_overlapping(
    value_T2C: Tensor,
    score_T2C: Tensor,
    ape_m2C: Tensor,
    partial: Tensor,
    overlap: Tensor,
    index: BatchIndex,
    target: EntryTarget,
    dtype: torch.dtype,
) -> None:
    """CSA: advances the slot's rows by the new tokens and stores every entry that closes. `dtype`: activations."""
    if use_triton(value_T2C):
        from kernels.triton_compressor import compress_overlapping_triton, fits_gpu

        if fits_gpu(partial.shape[3] // 2, target):
            compress_overlapping_triton(value_T2C, score_T2C, ape_m2C, partial, overlap, index, target, dtype)
            return
    compress_overlapping_ref(value_T2C, score_T2C, ape_m2C, partial, overlap, index, target, dtype)


def compress_pending(
    value_TC: Tensor,
    score_TC: Tensor,
    ape_mC: Tensor,
    pending: Tensor,
    index: BatchIndex,
    target: EntryTarget,
    dtype: torch.dtype,
) -> None:
    """HCA: advances the slot's online sums by the new tokens and stores every entry that closes."""
    if use_triton(value_TC):
        from kernels.triton_compressor import compress_pending_triton, fits_gpu

        if fits_gpu(pending.shape[2], target):
            compress_pending_triton(value_TC, score_TC, ape_mC, pending, index, target, dtype)
            return
    compress_pending_ref(value_TC, score_TC, ape_mC, pending, index, target, dtype)
