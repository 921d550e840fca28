"""Attention of every token over its window and a list of compressed entries, one softmax, one sink per head.

T tokens, H heads, D channels, W window, K listed entries, B requests. The shared vector of a row is key and value.
Window rows of earlier passes are read from the slot's ring (row = position mod W), rows of this pass from `chunk`, in
the same packed format, so a token sees the same bits whether its neighbours came in its own pass or earlier.
`selected_TK` lists entry numbers of the token's request, -1 = none; order does not matter. Without a list a token
attends to every entry it can see: those j < (p + 1) // ratio.

    logit[h, k] = q_h . key_k * scale
    out_h = sum_k exp(logit - m) key_k / (sum_k exp(logit - m) + exp(sink_h - m))

Softmax in float32, probabilities rounded to the activation dtype before the value product, float32 accumulation.
Bound by memory at decode (all heads share one read of a row), by the tensor cores at prefill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex, ranges
from kernels.dispatch import use_triton
from kernels.indexer import all_entries
from kernels.packed_rows import PackedRows, read_rows
from kernels.quantize import QuantizedRows

MAX_GATHERED = 1 << 24
"""Key elements the twin gathers at once; longer batches go in pieces."""
KEY_MULTIPLE = 16
"""The twin pads key lists to a multiple, so that a row's sums are grouped alike in every batch."""


def _window_plan(index: BatchIndex, window: int) -> tuple[Tensor, Tensor]:
    """(row of the table [B W ring | T chunk] for each key, absent) [T, W]."""
    request = index.token_request_T[:, None]
    steps = torch.arange(window - 1, -1, -1, device=request.device)
    position = index.positions_T[:, None] - steps
    context = index.context_len_B[request]
    num_ring = index.num_requests * window
    fresh = num_ring + index.query_start[request] + position - context
    row = torch.where(position >= context, fresh, request * window + position % window)
    return row, position < 0


def _ring_plan(index: BatchIndex, window: int) -> tuple[Tensor, Tensor]:
    """(slot, row) [B W] of all ring rows."""
    rows = torch.arange(window, device=index.slot_ids_B.device)
    return index.slot_ids_B.repeat_interleave(window), rows.repeat(index.num_requests)


def _entry_table(
    entries: PackedRows, selected_TK: Tensor, index: BatchIndex, ratio: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(rows [n, D], row of each listed entry [T, K]): all entries of the batch, or the listed ones if fewer."""
    counts = index.cached(("entry_counts", ratio), lambda: index.end_len_B // ratio)
    total = index.cached(("entry_total", ratio), lambda: int(counts.sum()))
    listed = selected_TK.clamp(min=0)
    if total <= selected_TK.numel():
        request, entry = index.cached(("all_entries", ratio), lambda: ranges(torch.zeros_like(counts), counts))
        page, row = index.entry_location(request, entry, ratio)
        first = counts.cumsum(0) - counts
        return read_rows(entries, page, row, dtype), first[index.token_request_T][:, None] + listed
    page, row = index.entry_location(index.token_request_T[:, None], listed, ratio)
    number = torch.arange(selected_TK.numel(), device=listed.device).view_as(listed)
    return read_rows(entries, page.flatten(), row.flatten(), dtype), number


def sparse_attention_ref(
    q_THD: Tensor,
    chunk: PackedRows,
    window: PackedRows,
    sink_H: Tensor,
    index: BatchIndex,
    scale: float,
    entries: PackedRows | None = None,
    selected_TK: Tensor | None = None,
    ratio: int = 0,
) -> Tensor:
    num_tokens, dtype = q_THD.shape[0], q_THD.dtype
    if not num_tokens:
        return torch.empty_like(q_THD)
    if entries is not None and selected_TK is None:
        selected_TK = all_entries(index, ratio)
    device = q_THD.device
    width = window.rows
    rows, absent = index.cached(("window", width), lambda: _window_plan(index, width))
    every = index.cached("every", lambda: torch.arange(num_tokens, device=device))
    ring = index.cached(("ring", width), lambda: _ring_plan(index, width))
    first = index.cached("zeros", lambda: torch.zeros(num_tokens, dtype=torch.int64, device=device))
    tables = [read_rows(window, *ring, dtype), read_rows(chunk, first, every, dtype)]
    num_ring = tables[0].shape[0]
    if entries is not None and selected_TK is not None and selected_TK.shape[1]:
        table, listed = _entry_table(entries, selected_TK, index, ratio, dtype)
        rows = torch.cat((rows, listed + (num_ring + num_tokens)), 1)
        absent = torch.cat((absent, selected_TK < 0), 1)
        tables.append(table)
    pad = -rows.shape[1] % KEY_MULTIPLE
    if pad:
        rows, absent = torch.nn.functional.pad(rows, (0, pad)), torch.nn.functional.pad(absent, (0, pad), value=True)
    # An absent key reads the token's own row: a valid one, whose weight is then exactly zero.
    rows = torch.where(absent, (num_ring + every)[:, None], rows)
    keys = torch.cat(tables).float()
    piece = max(1, MAX_GATHERED // (rows.shape[1] * keys.shape[1]))
    outputs = [
        _attend(q_THD[at : at + piece], keys[rows[at : at + piece]], absent[at : at + piece], sink_H, scale)
        for at in range(0, num_tokens, piece)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(q_THD: Tensor, keys_TSD: Tensor, absent_TS: Tensor, sink_H: Tensor, scale: float) -> Tensor:
    logits = torch.bmm(q_THD.float(), keys_TSD.mT).mul_(scale).masked_fill_(absent_TS[:, None], -torch.inf)
    top = torch.maximum(logits.amax(-1), sink_H)[..., None]
    weights = (logits - top).exp_()
    # Summed as a product: torch's own sum groups terms by the length of the list, which absent keys must not change.
    ones = weights.new_ones(weights.shape[-1], KEY_MULTIPLE)
    total = (weights.flatten(0, 1) @ ones)[:, :1].view_as(top) + (sink_H[:, None] - top).exp_()
    probabilities = (weights / total).to(q_THD.dtype).float()
    return torch.bmm(probabilities, keys_TSD).to(q_THD.dtype)


def sparse_attention(
    q_THD: Tensor,
    chunk: PackedRows,
    window: PackedRows,
    sink_H: Tensor,
    index: BatchIndex,
    scale: float,
    entries: PackedRows | None = None,
    selected_TK: Tensor | None = None,
    ratio: int = 0,
) -> Tensor:
    """q [T, H, D] activation dtype; chunk [1, T] and window [slots, W] of one format; sink [H] float32; entries
    [pages, rows] of blocks of `ratio` tokens; selected int [T, K], None = all visible ones. -> [T, H, D] like q. T may
    be 0."""
    if use_triton(q_THD) and _fits_gpu(q_THD, window):
        from kernels.gpu_attention import sparse_attention_gpu

        output = sparse_attention_gpu(q_THD, chunk, window, sink_H, index, scale, entries, selected_TK, ratio)
        assert isinstance(output, Tensor)
        return output
    return sparse_attention_ref(q_THD, chunk, window, sink_H, index, scale, entries, selected_TK, ratio)


def sparse_attention_for_fp8(
    q_THD: Tensor,
    chunk: PackedRows,
    window: PackedRows,
    sink_H: Tensor,
    index: BatchIndex,
    scale: float,
    entries: PackedRows | None,
    selected_TK: Tensor | None,
    ratio: int,
    angles: tuple[Tensor, Tensor],
) -> Tensor | QuantizedRows:
    """sparse_attention as an FP8 output projection takes it: heads rotated back by the angles (cos, sin), then
    QuantizedRows [T, H D], where a GPU kernel leaves them so. Elsewhere sparse_attention, not rotated."""
    if use_triton(q_THD) and _fits_gpu(q_THD, window):
        from kernels.gpu_attention import sparse_attention_gpu

        return sparse_attention_gpu(q_THD, chunk, window, sink_H, index, scale, entries, selected_TK, ratio, angles)
    return sparse_attention_ref(q_THD, chunk, window, sink_H, index, scale, entries, selected_TK, ratio)


def _fits_gpu(q_THD: Tensor, window: PackedRows) -> bool:
    """The kernels know bf16 queries of 64 * 2^n channels, 64 of them rotary, and two row formats."""
    blocks, rest = divmod(q_THD.shape[2], 64)
    shape = not rest and blocks & (blocks - 1) == 0 and window.rope_dim == 64
    return bool(shape and q_THD.dtype == torch.bfloat16 and window.format in ("kv_fp8", "bf16"))
