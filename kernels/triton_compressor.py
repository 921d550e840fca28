"""The compressors in Triton (specification: kernels.compressor).

T tokens, B requests, m ratio, C entry channels (a power of two). The first launch has a program per token: the one that
closes a block pools it, finishes the entry and stores it in its page; the others leave at once. The second launch, a
program per request, writes the slot's state, which the first one reads. Where every request has one token the first
launch does both. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.compressor import EntryTarget
from kernels.rope import rope_angles
from kernels.triton_common import INTERPRET
from kernels.triton_rows import FORMATS, as_activation, finish_row, fits, store_row, strides, views

CHUNK_ROWS = 8
"""Rows of an HCA block a program holds at once."""


@triton.jit
def _token(requests, positions, query_start, context_len, slot_ids, token):
    """-> request, position, context, (row of the new tokens) - (position), end, slot."""
    request = tl.load(requests + token).to(tl.int64)
    context = tl.load(context_len + request)
    start, stop = tl.load(query_start + request), tl.load(query_start + request + 1)
    position = tl.load(positions + token).to(tl.int32)
    return request, position, context, start - context, context + stop - start, tl.load(slot_ids + request).to(tl.int64)


@triton.jit
def _emit(
    pooled, norm, eps, cos, sin, token, request, block, page_table, stride_pages, rows_per_page,
    data, wide, scales, stride_page, stride_entry, stride_page_scales, stride_entry_scales, scale_bytes,
    WIDTH: tl.constexpr, BITS: tl.constexpr, ROTARY: tl.constexpr, ROPE: tl.constexpr, FORMAT: tl.constexpr,
    SIMULATE: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Finishes pooled channels [C] and stores them as entry `block` of the request. ROTARY channels are rotated; ROPE
    is what the pool's format keeps apart."""
    entry = finish_row(
        as_activation(pooled, BF16, INTERPRET), norm, eps, cos, sin, token, WIDTH, ROTARY, BF16, INTERPRET
    )
    page = tl.load(page_table + request * stride_pages + block // rows_per_page).to(tl.int64)
    row = block % rows_per_page
    store_row(
        entry, data, wide, scales, page * stride_page + row * stride_entry,
        page * stride_page_scales + row * stride_entry_scales, scale_bytes,
        WIDTH, BITS, ROPE, FORMAT, SIMULATE, BF16, INTERPRET,
    )  # fmt: skip


@triton.jit
def _history(
    value, score, ape, partial, overlap, stride_value, stride_score, stride_partial, stride_overlap,
    at, context, first_row, slot, column, from_overlap, RATIO: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Values and scores [n, C] of positions `at` [n], column [n, C] of 2 C: new rows where a position is in this pass,
    else the open block's rows or, where from_overlap [n], the last closed block's A halves. Position < 0: (0, -inf)."""
    phase = ((at + RATIO) % RATIO)[:, None]
    exists, fresh = (at >= 0)[:, None], (at >= context)[:, None]
    row = (first_row + at).to(tl.int64)[:, None]
    old = exists & ~fresh
    listed = old & from_overlap[:, None]
    kept = old & ~from_overlap[:, None]
    place = slot * stride_partial + phase * (4 * WIDTH) + column
    side = slot * stride_overlap + phase * (2 * WIDTH) + column
    fresh = fresh & exists
    v = tl.load(value + row * stride_value + column, mask=fresh, other=0.0)
    s = tl.load(score + row * stride_score + column, mask=fresh, other=0.0)
    s += tl.load(ape + phase * (2 * WIDTH) + column, mask=fresh, other=0.0)
    v = tl.where(kept, tl.load(partial + place, mask=kept, other=0.0), v)
    s = tl.where(kept, tl.load(partial + place + 2 * WIDTH, mask=kept, other=0.0), s)
    v = tl.where(listed, tl.load(overlap + side, mask=listed, other=0.0), v)
    s = tl.where(listed, tl.load(overlap + side + WIDTH, mask=listed, other=0.0), s)
    return v, tl.where(exists, s, float("-inf"))


@triton.jit
def _advance_overlapping(
    value, score, ape, partial, overlap, stride_value, stride_score, stride_partial, stride_overlap,
    context, end, first_row, slot, RATIO: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The slot's rows after this pass, of a request with new tokens."""
    row, channel = tl.arange(0, RATIO), tl.arange(0, WIDTH)
    place = row[:, None]
    open_from = end // RATIO * RATIO
    at = tl.where(context < open_from, open_from - RATIO + row, -1)
    closes = (at >= 0)[:, None]
    v, s = _history(
        value, score, ape, partial, overlap, stride_value, stride_score, stride_partial, stride_overlap,
        at, context, first_row, slot, channel[None, :], at < -1, RATIO, WIDTH,
    )  # fmt: skip
    # Every thread has read the old state before any writes the new one.
    tl.debug_barrier()
    target = overlap + slot * stride_overlap + place * (2 * WIDTH) + channel[None, :]
    tl.store(target, v, mask=closes)
    tl.store(target + WIDTH, s, mask=closes)
    at = open_from + row
    fresh = ((at >= context) & (at < end))[:, None]
    both = tl.arange(0, 2 * WIDTH)[None, :]
    source = (first_row + at).to(tl.int64)[:, None]
    v = tl.load(value + source * stride_value + both, mask=fresh, other=0.0)
    s = tl.load(score + source * stride_score + both, mask=fresh, other=0.0)
    s += tl.load(ape + place * (2 * WIDTH) + both, mask=fresh, other=0.0)
    target = partial + slot * stride_partial + place * (4 * WIDTH) + both
    tl.store(target, v, mask=fresh)
    tl.store(target + 2 * WIDTH, s, mask=fresh)


@triton.jit
def _close_overlapping_kernel(
    value, score, ape, partial, overlap, requests, positions, query_start, context_len, slot_ids, page_table,
    norm, cos, sin, data, wide, scales, eps, stride_value, stride_score, stride_partial, stride_overlap, stride_pages,
    rows_per_page, stride_page, stride_entry, stride_page_scales, stride_entry_scales, scale_bytes,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ROTARY: tl.constexpr, ROPE: tl.constexpr,
    FORMAT: tl.constexpr, SIMULATE: tl.constexpr, ADVANCE: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    request, position, context, first_row, end, slot = _token(
        requests, positions, query_start, context_len, slot_ids, token
    )
    if position % RATIO == RATIO - 1:
        row = tl.arange(0, 2 * RATIO)
        block = position // RATIO
        second = row >= RATIO
        column = tl.where(second, WIDTH, 0)[:, None] + tl.arange(0, WIDTH)[None, :]
        v, s = _history(
            value, score, ape, partial, overlap, stride_value, stride_score, stride_partial, stride_overlap,
            position - 2 * RATIO + 1 + row, context, first_row, slot, column,
            tl.where(second, -1, block) == context // RATIO, RATIO, WIDTH,
        )  # fmt: skip
        weight = tl.exp(s - tl.max(s, axis=0)[None, :])
        weight = weight / tl.sum(weight, axis=0)[None, :]
        _emit(
            tl.sum(weight * v, axis=0), norm, eps, cos, sin, token, request, block, page_table, stride_pages,
            rows_per_page, data, wide, scales, stride_page, stride_entry, stride_page_scales, stride_entry_scales,
            scale_bytes, WIDTH, BITS, ROTARY, ROPE, FORMAT, SIMULATE, BF16, INTERPRET,
        )  # fmt: skip
    if ADVANCE:
        _advance_overlapping(
            value, score, ape, partial, overlap, stride_value, stride_score, stride_partial, stride_overlap,
            context, end, first_row, slot, RATIO, WIDTH,
        )  # fmt: skip


@triton.jit
def _advance_overlapping_kernel(
    value, score, ape, partial, overlap, query_start, context_len, slot_ids,
    stride_value, stride_score, stride_partial, stride_overlap, RATIO: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    start, stop = tl.load(query_start + request), tl.load(query_start + request + 1)
    if stop > start:
        context = tl.load(context_len + request)
        _advance_overlapping(
            value, score, ape, partial, overlap, stride_value, stride_score, stride_partial, stride_overlap,
            context, context + stop - start, start - context, tl.load(slot_ids + request).to(tl.int64), RATIO, WIDTH,
        )  # fmt: skip


@triton.jit
def _pool_pending(
    value, score, ape, pending, stride_value, stride_score, stride_pending, block_start, context, stop, first_row, slot,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of exp and weighted sum [C] of the block's tokens up to `stop`, the pending ones included."""
    channel = tl.arange(0, WIDTH)
    old = pending + slot * stride_pending + channel
    continues = channel * 0 + block_start < context
    top = tl.load(old, mask=continues, other=float("-inf"))
    total = tl.load(old + WIDTH, mask=continues, other=0.0)
    summed = tl.load(old + 2 * WIDTH, mask=continues, other=0.0)
    for first in range(tl.maximum(block_start, context), stop, ROWS):
        at = first + tl.arange(0, ROWS)
        live = (at < stop)[:, None]
        row = (first_row + at).to(tl.int64)[:, None]
        s = tl.load(score + row * stride_score + channel[None, :], mask=live, other=0.0)
        s += tl.load(ape + (at - block_start)[:, None] * WIDTH + channel[None, :], mask=live, other=0.0)
        s = tl.where(live, s, float("-inf"))
        v = tl.load(value + row * stride_value + channel[None, :], mask=live, other=0.0)
        new_top = tl.maximum(top, tl.max(s, axis=0))
        weight = tl.exp(s - new_top[None, :])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weight, axis=0)
        summed = summed * shrink + tl.sum(weight * v, axis=0)
        top = new_top
    return top, total, summed


@triton.jit
def _store_pending(top, total, summed, pending, stride_pending, slot, WIDTH: tl.constexpr):
    # Every thread has read the old state before any writes the new one.
    tl.debug_barrier()
    target = pending + slot * stride_pending + tl.arange(0, WIDTH)
    tl.store(target, top)
    tl.store(target + WIDTH, total)
    tl.store(target + 2 * WIDTH, summed)


@triton.jit
def _close_pending_kernel(
    value, score, ape, pending, requests, positions, query_start, context_len, slot_ids, page_table,
    norm, cos, sin, data, wide, scales, eps, stride_value, stride_score, stride_pending, stride_pages,
    rows_per_page, stride_page, stride_entry, stride_page_scales, stride_entry_scales, scale_bytes,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ROTARY: tl.constexpr, ROPE: tl.constexpr,
    FORMAT: tl.constexpr, SIMULATE: tl.constexpr, ADVANCE: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    request, position, context, first_row, _, slot = _token(
        requests, positions, query_start, context_len, slot_ids, token
    )
    block = position // RATIO
    closes = position % RATIO == RATIO - 1
    if closes | ADVANCE:
        top, total, summed = _pool_pending(
            value, score, ape, pending, stride_value, stride_score, stride_pending, block * RATIO, context,
            position + 1, first_row, slot, WIDTH, ROWS,
        )  # fmt: skip
        if closes:
            _emit(
                summed / total, norm, eps, cos, sin, token, request, block, page_table, stride_pages, rows_per_page,
                data, wide, scales, stride_page, stride_entry, stride_page_scales, stride_entry_scales, scale_bytes,
                WIDTH, BITS, ROTARY, ROPE, FORMAT, SIMULATE, BF16, INTERPRET,
            )  # fmt: skip
        elif ADVANCE:
            _store_pending(top, total, summed, pending, stride_pending, slot, WIDTH)


@triton.jit
def _advance_pending_kernel(
    value, score, ape, pending, query_start, context_len, slot_ids, stride_value, stride_score, stride_pending,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    start, stop = tl.load(query_start + request), tl.load(query_start + request + 1)
    context = tl.load(context_len + request)
    end = context + stop - start
    if (stop > start) & (end % RATIO != 0):
        slot = tl.load(slot_ids + request).to(tl.int64)
        top, total, summed = _pool_pending(
            value, score, ape, pending, stride_value, stride_score, stride_pending, end // RATIO * RATIO, context, end,
            start - context, slot, WIDTH, ROWS,
        )  # fmt: skip
        _store_pending(top, total, summed, pending, stride_pending, slot, WIDTH)


def fits_gpu(channels: int, target: EntryTarget) -> bool:
    """Whether the kernels know entries of these channels in this pool."""
    return fits(target.pool) and target.pool.width == channels


def _closing_angles(index: BatchIndex, ratio: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R / 2] at the first position of each token's block."""
    key = ("block_angles", ratio, frequencies.data_ptr())
    return index.cached(key, lambda: rope_angles(index.positions_T - index.positions_T % ratio, frequencies))


def compress_overlapping_triton(
    value_T2C: Tensor,
    score_T2C: Tensor,
    ape_m2C: Tensor,
    partial: Tensor,
    overlap: Tensor,
    index: BatchIndex,
    target: EntryTarget,
    dtype: torch.dtype,
) -> None:
    """kernels.compressor.compress_overlapping; columns of value, score and ape contiguous."""
    if not index.num_tokens:
        return
    pool, ratio, width = target.pool, ape_m2C.shape[0], ape_m2C.shape[1] // 2
    state_strides = (value_T2C.stride(0), score_T2C.stride(0), partial.stride(0), overlap.stride(0))
    warps = 4 if width > 128 else 2
    _close_overlapping_kernel[(index.num_tokens,)](
        value_T2C, score_T2C, ape_m2C, partial, overlap, index.token_request_T, index.positions_T, index.query_start,
        index.context_len_B, index.slot_ids_B, index.page_table, target.norm_C,
        *_closing_angles(index, ratio, target.frequencies), *views(pool), target.eps, *state_strides,
        index.page_table.stride(0), index.page_tokens // ratio, *strides(pool), RATIO=ratio, WIDTH=width,
        BITS=width.bit_length() - 1, ROTARY=2 * target.frequencies.shape[0], ROPE=pool.rope_dim,
        FORMAT=FORMATS[pool.format], SIMULATE=target.simulate, ADVANCE=index.one_token_each,
        BF16=dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=warps,
    )  # fmt: skip
    if not index.one_token_each:
        _advance_overlapping_kernel[(index.num_requests,)](
            value_T2C, score_T2C, ape_m2C, partial, overlap, index.query_start, index.context_len_B, index.slot_ids_B,
            *state_strides, RATIO=ratio, WIDTH=width, num_warps=warps,
        )  # fmt: skip


def compress_pending_triton(
    value_TC: Tensor,
    score_TC: Tensor,
    ape_mC: Tensor,
    pending: Tensor,
    index: BatchIndex,
    target: EntryTarget,
    dtype: torch.dtype,
) -> None:
    """kernels.compressor.compress_pending; columns of value, score and ape contiguous."""
    if not index.num_tokens:
        return
    pool, (ratio, width) = target.pool, ape_mC.shape
    state_strides = (value_TC.stride(0), score_TC.stride(0), pending.stride(0))
    _close_pending_kernel[(index.num_tokens,)](
        value_TC, score_TC, ape_mC, pending, index.token_request_T, index.positions_T, index.query_start,
        index.context_len_B, index.slot_ids_B, index.page_table, target.norm_C,
        *_closing_angles(index, ratio, target.frequencies), *views(pool), target.eps, *state_strides,
        index.page_table.stride(0), index.page_tokens // ratio, *strides(pool), RATIO=ratio, WIDTH=width,
        BITS=width.bit_length() - 1, ROTARY=2 * target.frequencies.shape[0], ROPE=pool.rope_dim,
        FORMAT=FORMATS[pool.format], SIMULATE=target.simulate, ADVANCE=index.one_token_each,
        ROWS=1 if index.one_token_each else CHUNK_ROWS, BF16=dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip
    if not index.one_token_each:
        _advance_pending_kernel[(index.num_requests,)](
            value_TC, score_TC, ape_mC, pending, index.query_start, index.context_len_B, index.slot_ids_B,
            *state_strides, RATIO=ratio, WIDTH=width, ROWS=CHUNK_ROWS, num_warps=4,
        )  # fmt: skip
