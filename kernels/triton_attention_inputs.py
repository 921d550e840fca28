"""Query norm + RoPE and KV norm + RoPE + quantise + insert in one launch (specification: kernels.attention_inputs).

A program takes a few heads of one token, the token's last program its KV row. Bound by memory: two passes over the
query, half a kilobyte for the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.packed_rows import PackedRows
from kernels.triton_common import INTERPRET, to_bf16
from kernels.triton_rows import FORMATS, as_activation, finish_row, rotate, store_row, strides, views
from kernels.triton_rows import fits as fits_rows

TILE = 4096
"""Query elements a program holds."""


@triton.jit
def _inputs_kernel(
    query, row, norm, cos, sin, requests, positions, slot_ids,
    chunk, chunk_wide, chunk_scales, ring, ring_wide, ring_scales, num_heads, eps, stride_query, stride_row,
    stride_chunk, stride_chunk_scales, stride_slot, stride_place, stride_slot_scales, stride_place_scales, scale_bytes,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr,
    FORMAT: tl.constexpr, SIMULATE: tl.constexpr, INSERT: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    if part + 1 < tl.num_programs(1):
        head = part * HEADS + tl.arange(0, HEADS)
        inside = (head < num_heads)[:, None]
        place = query + token * stride_query + head[:, None] * WIDTH + channel[None, :]
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        x = as_activation(x * tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None], BF16, INTERPRET)
        x = rotate(x, cos, sin, token, ROPE, False)
        tl.store(place, to_bf16(x, INTERPRET) if BF16 else x, mask=inside)
    else:
        kv = tl.load(row + token * stride_row + channel).to(tl.float32)
        kv = finish_row(kv, norm, eps, cos, sin, token, WIDTH, ROPE, BF16, INTERPRET)
        store_row(
            kv, chunk, chunk_wide, chunk_scales, token * stride_chunk, token * stride_chunk_scales, scale_bytes,
            WIDTH, BITS, ROPE, FORMAT, SIMULATE, BF16, INTERPRET,
        )  # fmt: skip
        if INSERT:
            slot = tl.load(slot_ids + tl.load(requests + token)).to(tl.int64)
            row_place = tl.load(positions + token) % WINDOW
            store_row(
                kv, ring, ring_wide, ring_scales, slot * stride_slot + row_place * stride_place,
                slot * stride_slot_scales + row_place * stride_place_scales, scale_bytes,
                WIDTH, BITS, ROPE, FORMAT, SIMULATE, BF16, INTERPRET,
            )  # fmt: skip


def fits(query_THD: Tensor, window: PackedRows) -> bool:
    return query_THD.dtype in (torch.bfloat16, torch.float32) and bool(window.rope_dim) and fits_rows(window)


def attention_inputs_triton(
    query_THD: Tensor,
    row_TD: Tensor,
    norm_D: Tensor,
    angles: tuple[Tensor, Tensor],
    eps: float,
    window: PackedRows,
    index: BatchIndex,
    *,
    simulate: bool,
    finished: bool = False,
) -> tuple[Tensor, PackedRows]:
    """kernels.attention_inputs.attention_inputs for contiguous heads and rows with contiguous channels; the query is
    overwritten."""
    num_tokens, num_heads, width = query_THD.shape
    chunk = window.like(num_tokens)
    if num_tokens:
        heads = max(1, min(TILE // width, triton.next_power_of_2(num_heads)))
        _, stride_chunk, _, stride_chunk_scales, _ = strides(chunk)
        _inputs_kernel[(num_tokens, 1 if finished else triton.cdiv(num_heads, heads) + 1)](
            query_THD, row_TD, norm_D, *angles, index.token_request_T, index.positions_T, index.slot_ids_B,
            *views(chunk), *views(window), num_heads, eps, query_THD.stride(0), row_TD.stride(0),
            stride_chunk, stride_chunk_scales, *strides(window),
            HEADS=heads, WIDTH=width, BITS=width.bit_length() - 1, ROPE=window.rope_dim, WINDOW=window.rows,
            FORMAT=FORMATS[window.format], SIMULATE=simulate, INSERT=index.one_token_each,
            BF16=query_THD.dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=4,
        )  # fmt: skip
    return query_THD, chunk
