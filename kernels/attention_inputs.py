"""Query heads and the new KV row of every token, ready for attention: norms, rotation, and the row packed.

T tokens, H heads, D channels, the last R rotary. Per head: RMS norm without weight, then the rotation; the row: RMS
norm with weight, the rotation, and packed_rows.store_rows into `chunk` [1, T], in the format of the window ring, so
that attention sees the bits that later tokens will find. Heads may come finished (kernels.query_heads).

Where every request has one token (index.one_token_each), rows also go to their place in the ring at once: what they
overwrite has just left the window. Other passes call window_ring.insert_window after attention. Bound by memory: query
and row are read and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.dispatch import use_triton
from kernels.packed_rows import PackedRows, store_rows
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.window_ring import insert_window


def attention_inputs_ref(
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
    count, device = row_TD.shape[0], row_TD.device
    chunk = window.like(count)
    page, place = index.cached(
        "chunk_rows",
        lambda: (torch.zeros(count, dtype=torch.int64, device=device), torch.arange(count, device=device)),
    )
    store_rows(chunk, page, place, rope(rms_norm(row_TD, norm_D, eps), *angles), simulate=simulate)
    if index.one_token_each:
        insert_window(chunk, window, index)
    return query_THD if finished else rope(rms_norm(query_THD, None, eps), *angles), chunk


def attention_inputs(
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
    """query [T, H, D] and row [T, D] in the activation dtype; norm float32 [D]; angles (cos, sin) float32 [T, R / 2].
    finished: heads are normed and rotated already. -> (query like the input, which may be overwritten; chunk)."""
    if use_triton(query_THD):
        from kernels.triton_attention_inputs import attention_inputs_triton, fits

        if fits(query_THD, window):
            return attention_inputs_triton(
                query_THD, row_TD, norm_D, angles, eps, window, index, simulate=simulate, finished=finished
            )
    return attention_inputs_ref(
        query_THD, row_TD, norm_D, angles, eps, window, index, simulate=simulate, finished=finished
    )
