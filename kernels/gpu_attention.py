"""Sparse attention on the GPU: kernels/cuda/sparse_attention.cu where it fits, the Triton kernel elsewhere.

The Hopper kernel takes 64 heads of 512 channels over kv_fp8 rows; specification: kernels.sparse_attention.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.batch_index import BatchIndex
from kernels.packed_rows import PackedRows
from kernels.triton_common import INTERPRET
from kernels.triton_fp8_gemm import num_multiprocessors
from kernels.triton_sparse_attention import LOG2E, _join_kernel, entries_of, sparse_attention_triton

HEADS, CHANNELS, ROPE = 64, 512, 64
TILE_KEYS = 64
MAX_SPLITS = 8


def fits_hopper(q_THD: Tensor, window: PackedRows) -> bool:
    """Whether the shapes and this machine can run the Hopper kernel."""
    if (
        not q_THD.is_cuda
        or tuple(q_THD.shape[1:]) != (HEADS, CHANNELS)
        or window.format != "kv_fp8"
        or window.rope_dim != ROPE
    ):
        return False
    try:
        cuda_build.load("sparse_attention")
    except cuda_build.CudaUnavailable:
        return False
    return bool(q_THD.dtype == torch.bfloat16)


def splits_for(num_tokens: int, num_keys: int, multiprocessors: int) -> int:
    """Parts of the key list: as many as fit in one wave of programs, each with at least two tiles of keys."""
    tiles = -(-num_keys // TILE_KEYS)
    return max(1, min(MAX_SPLITS, multiprocessors // max(1, num_tokens), tiles // 2))


def sparse_attention_hopper(
    q_THD: Tensor,
    chunk: PackedRows,
    window: PackedRows,
    sink_H: Tensor,
    index: BatchIndex,
    scale: float,
    entries: PackedRows | None = None,
    selected_TK: Tensor | None = None,
    ratio: int = 0,
    splits: int | None = None,
) -> Tensor:
    """kernels.sparse_attention.sparse_attention for the released size. `splits` is for tests and benches."""
    num_tokens, num_heads, width = q_THD.shape
    device = q_THD.device
    output = torch.empty(num_tokens, num_heads, width, dtype=q_THD.dtype, device=device)
    if not num_tokens:
        return output
    entries, selected, every = entries_of(entries, selected_TK, window, num_tokens)
    rows_per_page = index.page_tokens // ratio if ratio else 1
    num_keys = window.rows + (index.page_table.shape[1] * rows_per_page if every else selected.shape[1])
    if splits is None:
        splits = splits_for(num_tokens, num_keys, num_multiprocessors(device))
    shape = (num_tokens, splits, num_heads) if splits > 1 else (0, 0, 0)
    parts = torch.empty(*shape, width, dtype=torch.float32, device=device)
    tops, norms = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    pools = (window, chunk, entries)
    rows: list[Tensor] = []
    for pool in pools:
        assert pool.scales is not None
        rows += (pool.data, pool.scales)
    tensors = (
        q_THD, sink_H, output, parts, tops, norms, index.token_request_T, index.positions_T, index.query_start,
        index.context_len_B, index.slot_ids_B, index.page_table, selected, *rows,
    )  # fmt: skip
    ring, ring_scales, new, new_scales, listed, listed_scales = rows
    strides = (
        q_THD.stride(0), ring.stride(0), ring_scales.stride(0), ring.stride(1), ring_scales.stride(1), new.stride(1),
        new_scales.stride(1), listed.stride(0), listed_scales.stride(0), listed.stride(1), listed_scales.stride(1),
    )  # fmt: skip
    integers = (
        index.page_table.stride(0), selected.stride(0), window.rows, selected.shape[1], rows_per_page,
        ratio if every else 0, splits,
    )  # fmt: skip
    error = cuda_build.load("sparse_attention").sparse_attention(
        (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors)),
        (c_int64 * len(strides))(*strides),
        (c_int * len(integers))(*integers),
        c_float(scale * LOG2E),
        num_tokens,
        cuda_build.stream(device),
    )
    cuda_build.check(error, f"sparse_attention({num_tokens} tokens, {num_keys} keys, {splits} splits)")
    if splits > 1:
        padded = 1 << (splits - 1).bit_length()
        _join_kernel[(num_tokens, num_heads)](
            parts, tops, norms, sink_H, output, num_heads, splits, SPLITS=padded, WIDTH=width, INTERPRET=INTERPRET,
            num_warps=4,
        )  # fmt: skip
    return output


def sparse_attention_gpu(
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
    """kernels.sparse_attention.sparse_attention by the fastest kernel that fits."""
    run = sparse_attention_hopper if fits_hopper(q_THD, window) else sparse_attention_triton
    return run(q_THD, chunk, window, sink_H, index, scale, entries, selected_TK, ratio)
