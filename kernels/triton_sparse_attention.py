"""Sparse attention straight from packed rows in pages and slots (specification: kernels.sparse_attention).

T tokens, H heads, D channels (64 rotary), W window rows, K listed entries. A program takes one token and all its heads,
so that every row is fetched and dequantised once, and walks the window, then the list, in blocks of keys; one online
softmax. Blocks beyond PART_BLOCKS go to further programs, and a second launch joins the parts: a token's own number of
keys decides that, so that its sums are the same in every batch.

Row formats: kv_fp8 (e4m3 in blocks of 64 channels with an E8M0 byte each, bf16 rotary channels) and bf16. Products run
in bf16, where dequantised rows are exact; softmax in float32; weights become bf16 before they are divided by their sum.
Bound: reads of rows at decode, bf16 tensor cores at prefill, where rows come from L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.packed_rows import PackedRows
from kernels.triton_common import INTERPRET, dot_operand, from_exponent_byte, power_of_two_scale, to_bf16, to_e4m3
from kernels.triton_rows import rotate

CHANNEL_BLOCK = 64
BLOCK_KEYS = 32
LOG2E = 1.4426950408889634
PART_BLOCKS = 64
"""Blocks of keys that one program takes."""


@triton.jit
def _load_keys(
    data, rotary, scales, place, scale_place, valid, BLOCKS: tl.constexpr, FP8: tl.constexpr, INTERPRET: tl.constexpr
):
    """Rows at element offsets `place` [K] -> [K, 64 * BLOCKS] for tl.dot, zeros where not valid."""
    block, inner = tl.arange(0, BLOCKS)[None, :, None], tl.arange(0, 64)[None, None, :]
    live = valid[:, None, None]
    if FP8:
        last: tl.constexpr = BLOCKS - 1
        codes = tl.load(data + place[:, None, None] + block * 64 + inner, mask=live & (block < last), other=0.0)
        column = tl.arange(0, BLOCKS)[None, :]
        exponent = tl.load(scales + scale_place[:, None] + column, mask=valid[:, None] & (column < last), other=127)
        # e4m3 times a power of two is exact in bf16, which takes half the registers of float32.
        factor = dot_operand(from_exponent_byte(exponent), INTERPRET)
        plain = dot_operand(codes, INTERPRET) * factor[:, :, None]
        rope_place = place[:, None, None] // 2 + last * 32 + inner
        rope = tl.load(rotary + rope_place + block * 0, mask=live & (block == last), other=0.0)
        keys = tl.where(block == last, dot_operand(rope, INTERPRET), plain)
    else:
        keys = tl.load(data + place[:, None, None] + block * 64 + inner, mask=live, other=0.0)
    return dot_operand(tl.reshape(keys, (place.shape[0], BLOCKS * 64)), INTERPRET)


@triton.jit
def _attend(q, keys, valid, top, norm, total, logit_scale, INTERPRET: tl.constexpr):
    """One block of keys into the running softmax; logits in powers of two."""
    logits = tl.dot(q, tl.trans(keys)) * logit_scale
    logits = tl.where(valid[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    norm = norm * shrink + tl.sum(weights, axis=1)
    weights = dot_operand(to_bf16(weights, INTERPRET), INTERPRET)
    total = tl.dot(weights, keys, total * shrink[:, None])
    return new_top, norm, total


@triton.jit
def _attention_kernel(
    q, sink, output, parts, part_tops, part_norms, requests, positions, query_start, context_len, slot_ids, page_table,
    ring, ring_rotary, ring_scales, chunk_offset, chunk_scale_offset, entries, entry_rotary, entry_scales, selected,
    num_heads, num_selected, ratio, rows_per_page, logit_scale, stride_q, stride_pages, stride_selected,
    stride_slot, stride_slot_scales, stride_row, stride_row_scales, stride_chunk_row, stride_chunk_scales,
    stride_page, stride_page_scales, stride_entry, stride_entry_scales,
    splits, part_blocks,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr, DIVIDED: tl.constexpr,
    FP8: tl.constexpr, EVERY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width: tl.constexpr = BLOCKS * 64
    position = tl.load(positions + token).to(tl.int32)
    window_blocks: tl.constexpr = (WINDOW + KEYS - 1) // KEYS
    if EVERY:
        num_selected = (position + 1) // ratio
    blocks = window_blocks + tl.cdiv(num_selected, KEYS)
    start = split * part_blocks
    if start >= blocks:
        return  # others in the batch have more keys
    stop = min(blocks, start + part_blocks)

    head, channel = tl.arange(0, HEADS), tl.arange(0, width)
    inside = (head < num_heads)[:, None]
    query = tl.load(q + token * stride_q + head[:, None] * width + channel[None, :], mask=inside, other=0.0)
    query = dot_operand(query, INTERPRET)
    request = tl.load(requests + token).to(tl.int64)
    context = tl.load(context_len + request)
    first_row = tl.load(query_start + request) - context
    slot = tl.load(slot_ids + request).to(tl.int64)

    # A finite start: a block without a valid key then leaves zero weights instead of NaN.
    top = tl.full((HEADS,), -1.0e30, tl.float32)
    norm = tl.zeros((HEADS,), tl.float32)
    total = tl.zeros((HEADS, width), tl.float32)

    for block in range(min(start, window_blocks), min(stop, window_blocks)):
        step = block * KEYS + tl.arange(0, KEYS)
        key = position - step
        valid = (key >= 0) & (step < WINDOW)
        row = tl.maximum(key, 0)
        fresh = row >= context
        chunk_row = (first_row + row).to(tl.int64)
        place = tl.where(
            fresh, chunk_offset + chunk_row * stride_chunk_row, slot * stride_slot + row % WINDOW * stride_row
        )
        scale_place = tl.where(
            fresh,
            chunk_scale_offset + chunk_row * stride_chunk_scales,
            slot * stride_slot_scales + row % WINDOW * stride_row_scales,
        )
        keys = _load_keys(ring, ring_rotary, ring_scales, place, scale_place, valid, BLOCKS, FP8, INTERPRET)
        top, norm, total = _attend(query, keys, valid, top, norm, total, logit_scale, INTERPRET)

    for block in range(max(start, window_blocks), max(stop, window_blocks)):
        number = (block - window_blocks) * KEYS + tl.arange(0, KEYS)
        if EVERY:
            entry = tl.where(number < num_selected, number, -1)
        else:
            entry = tl.load(selected + token * stride_selected + number, mask=number < num_selected, other=-1)
            entry = entry.to(tl.int32)
        valid = entry >= 0
        entry = tl.maximum(entry, 0)
        page = tl.load(page_table + request * stride_pages + entry // rows_per_page, mask=valid, other=0).to(tl.int64)
        row = entry % rows_per_page
        place = page * stride_page + row * stride_entry
        scale_place = page * stride_page_scales + row * stride_entry_scales
        keys = _load_keys(entries, entry_rotary, entry_scales, place, scale_place, valid, BLOCKS, FP8, INTERPRET)
        top, norm, total = _attend(query, keys, valid, top, norm, total, logit_scale, INTERPRET)

    if blocks <= part_blocks:
        sunk = tl.load(sink + head, mask=head < num_heads, other=0.0) * 1.4426950408889634
        final = tl.maximum(top, sunk)
        shrink = tl.exp2(top - final)
        norm = norm * shrink + tl.exp2(sunk - final)
        result = to_bf16(total * (shrink / norm)[:, None], INTERPRET)
        tl.store(output + (token * num_heads + head[:, None]) * width + channel[None, :], result, mask=inside)
    elif DIVIDED:
        part = (token * splits + split) * num_heads + head
        tl.store(parts + part[:, None] * width + channel[None, :], total, mask=inside)
        tl.store(part_tops + part, top, mask=head < num_heads)
        tl.store(part_norms + part, norm, mask=head < num_heads)


@triton.jit
def _join_kernel(
    parts, part_tops, part_norms, sink, output, scales, cos, sin, positions, num_heads, splits, stride_scales,
    window_tiles, listed, every_ratio, part_tiles,
    SPLITS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    split = tl.arange(0, SPLITS)
    place = (token * splits + split) * num_heads + head
    if TILE:
        if every_ratio:
            listed = ((tl.load(positions + token) + 1) // every_ratio).to(tl.int32)
        splits = tl.cdiv(window_tiles + tl.cdiv(listed, TILE), part_tiles)
        if splits == 1:
            return  # not divided: the output is there
    sunk = tl.load(sink + head) * 1.4426950408889634
    tops = tl.load(part_tops + place, mask=split < splits, other=-1.0e30)
    final = tl.maximum(tl.max(tops, axis=0), sunk)
    shrink = tl.exp2(tops - final)
    norms = tl.load(part_norms + place, mask=split < splits, other=0.0)
    norm = tl.sum(norms * shrink, axis=0) + tl.exp2(sunk - final)
    rows = tl.load(parts + place[:, None] * WIDTH + channel[None, :], mask=(split < splits)[:, None], other=0.0)
    result = to_bf16(tl.sum(rows * (shrink / norm)[:, None], axis=0), INTERPRET)
    target = output + (token * num_heads + head) * WIDTH + channel
    if ROPE:
        groups: tl.constexpr = WIDTH // 128
        turned = rotate(tl.reshape(result.to(tl.float32), (1, WIDTH)), cos, sin, token, ROPE, True)
        blocks = tl.reshape(to_bf16(turned, INTERPRET).to(tl.float32), (groups, 128))
        scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(blocks), axis=1), 1e-4), 1.0 / 448.0)
        tl.store(target, tl.reshape(to_e4m3(blocks * (1.0 / scale)[:, None], INTERPRET), (WIDTH,)))
        group = (head * groups + tl.arange(0, groups)).to(tl.int64)
        tl.store(scales + group * stride_scales + token, scale)
    else:
        tl.store(target, result)


class Division(NamedTuple):
    """How a token's keys are divided: by their number alone, so that its sums do not depend on its batch."""

    positions_T: Tensor
    tile_keys: int
    window_tiles: int
    listed: int
    """Entries of each token, if `every_ratio` is 0."""
    every_ratio: int
    """Else a token has an entry for that many tokens up to its own."""
    part_tiles: int


def join_parts(
    parts: Tensor,
    tops: Tensor,
    norms: Tensor,
    sink_H: Tensor,
    output_THD: Tensor,
    scales: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    division: Division | None = None,
) -> None:
    """Sums of parts of the keys, float32 [T, splits, H, D], with their highest logits (in powers of two) and norms
    [T, splits, H], into the output; with angles (cos, sin), rotated back into e4m3 and scales [H D / 128, T].
    division: how many parts each token has, one of them being the output already; None = all."""
    num_tokens, splits, num_heads, width = parts.shape
    cos, sin = angles or (scales, scales)
    how = division or Division(tops, 0, 0, 0, 0, 1)
    _join_kernel[(num_tokens, num_heads)](
        parts, tops, norms, sink_H, output_THD, scales, cos, sin, how.positions_T, num_heads, splits, scales.stride(0),
        how.window_tiles, how.listed, how.every_ratio, how.part_tiles, SPLITS=triton.next_power_of_2(splits),
        TILE=how.tile_keys, WIDTH=width, ROPE=2 * cos.shape[1] if angles else 0, INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip


def _views(pool: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
    """(data, rotary view, scales) as the kernel takes them."""
    if pool.format == "kv_fp8":
        assert pool.scales is not None
        return pool.data.view(torch.float8_e4m3fn), pool.data.view(torch.bfloat16), pool.scales
    if pool.format == "bf16":
        return pool.data, pool.data, pool.data
    raise ValueError(f"{pool.format} rows: the attention kernel reads kv_fp8 and bf16")


def entries_of(
    entries: PackedRows | None, selected_TK: Tensor | None, window: PackedRows, num_tokens: int
) -> tuple[PackedRows, Tensor, bool]:
    """(pool of entries, int32 list [T, K], whether all visible entries count instead of a list). A layer without
    entries gets an empty list over the window's pool."""
    if entries is not None and selected_TK is not None and selected_TK.shape[1]:
        return entries, selected_TK.int(), False
    nothing = torch.empty(num_tokens, 0, dtype=torch.int32, device=window.data.device)
    if entries is not None and selected_TK is None:
        return entries, nothing, True
    return window, nothing, False


def sparse_attention_triton(
    q_THD: Tensor,
    chunk: PackedRows,
    window: PackedRows,
    sink_H: Tensor,
    index: BatchIndex,
    scale: float,
    entries: PackedRows | None = None,
    selected_TK: Tensor | None = None,
    ratio: int = 0,
    part_blocks: int = PART_BLOCKS,
) -> Tensor:
    """kernels.sparse_attention.sparse_attention for bf16 queries. `part_blocks` is for tests."""
    num_tokens, num_heads, width = q_THD.shape
    blocks = width // CHANNEL_BLOCK
    if q_THD.dtype != torch.bfloat16 or width % CHANNEL_BLOCK or blocks & (blocks - 1):
        raise ValueError(f"q {tuple(q_THD.shape)} {q_THD.dtype}: the kernel needs bfloat16 and 64 * 2^n channels")
    if window.format == "kv_fp8" and window.rope_dim != CHANNEL_BLOCK:
        raise ValueError(f"rope_dim={window.rope_dim}: the kernel needs {CHANNEL_BLOCK} rotary channels")
    output = torch.empty_like(q_THD)
    if not num_tokens:
        return output
    device = q_THD.device
    entries, listed, every = entries_of(entries, selected_TK, window, num_tokens)
    rows_per_page = index.page_tokens // ratio if ratio else 1
    most = index.page_table.shape[1] * rows_per_page if every else listed.shape[1]
    window_blocks = triton.cdiv(window.rows, BLOCK_KEYS)
    splits = triton.cdiv(window_blocks + triton.cdiv(most, BLOCK_KEYS), part_blocks)
    ring, ring_rotary, ring_scales = _views(window)
    new, _, new_scales = _views(chunk)
    table, table_rotary, table_scales = _views(entries)
    shape = (num_tokens, splits, num_heads) if splits > 1 else (0, 0, 0)
    parts = torch.empty(*shape, width, dtype=torch.float32, device=device)
    tops, norms = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    _attention_kernel[(num_tokens, splits)](
        q_THD, sink_H, output, parts, tops, norms, index.token_request_T, index.positions_T, index.query_start,
        index.context_len_B, index.slot_ids_B, index.page_table, ring, ring_rotary, ring_scales,
        # Fresh rows live in another allocation: the kernel reaches them from the ring's address.
        (new.data_ptr() - ring.data_ptr()) // ring.element_size(),
        (new_scales.data_ptr() - ring_scales.data_ptr()) // ring_scales.element_size(),
        table, table_rotary, table_scales, listed, num_heads, listed.shape[1], max(1, ratio), rows_per_page,
        scale * LOG2E, q_THD.stride(0), index.page_table.stride(0), listed.stride(0),
        ring.stride(0), ring_scales.stride(0), ring.stride(1), ring_scales.stride(1), new.stride(1),
        new_scales.stride(1), table.stride(0), table_scales.stride(0), table.stride(1), table_scales.stride(1),
        splits, part_blocks,
        WINDOW=window.rows, HEADS=max(16, triton.next_power_of_2(num_heads)), BLOCKS=blocks, KEYS=BLOCK_KEYS,
        DIVIDED=splits > 1, FP8=window.format == "kv_fp8", EVERY=every, INTERPRET=INTERPRET,
        num_warps=8 if width > 128 else 4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        division = Division(
            index.positions_T, BLOCK_KEYS, window_blocks, listed.shape[1], max(1, ratio) if every else 0, part_blocks
        )
        join_parts(parts, tops, norms, sink_H, output, norms[0], None, division)
    return output
