"""Moves a pass's KV rows into the slots' window rings, after attention has read the rings.

T new rows, packed in `chunk` [1, T]; ring [slots, W], row = position mod W. Only the last W rows of each request are
moved, so every target row is written once. Bytes are copied, never re-quantised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.dispatch import use_triton
from kernels.packed_rows import PackedRows, copy_rows


def _plan(index: BatchIndex, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last = index.end_len_B[index.token_request_T]
    token = (index.positions_T >= last - window).nonzero()[:, 0]
    slot = index.slot_ids_B[index.token_request_T[token]]
    return torch.zeros_like(token), token, slot, index.positions_T[token] % window


def insert_window_ref(chunk: PackedRows, ring: PackedRows, index: BatchIndex) -> None:
    page, token, slot, row = index.cached(("insert", ring.rows), lambda: _plan(index, ring.rows))
    copy_rows(chunk, page, token, ring, slot, row)


def insert_window(chunk: PackedRows, ring: PackedRows, index: BatchIndex) -> None:
    if use_triton(chunk.data):
        from kernels.triton_rows import insert_window_triton

        insert_window_triton(chunk, ring, index)
        return
    insert_window_ref(chunk, ring, index)
