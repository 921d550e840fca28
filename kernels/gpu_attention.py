"""Sparse attention on the GPU: kernels of kernels/cuda where they fit, the Triton kernel elsewhere.

Specification: kernels.sparse_attention. The Hopper kernels take 64 heads of 512 channels over kv_fp8 rows:
sparse_attention reads packed rows, chunk_attention first widens every row that the pass can read, which pays as soon as
each is read several times. The table of widened rows holds the slots' rings, the chunk, and the entries of the pass's
requests, as many for each as the widest page table has.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.batch_index import BatchIndex
from kernels.packed_rows import PackedRows
from kernels.quantize import QuantizedRows
from kernels.triton_fp8_gemm import num_multiprocessors
from kernels.triton_quantize import scale_stride
from kernels.triton_sparse_attention import LOG2E, Division, entries_of, join_parts, sparse_attention_triton

HEADS, CHANNELS, ROPE = 64, 512, 64
TILE_KEYS = 64
SCALE_GROUP = 128
PART_TILES = 32
"""Tiles of keys that one program takes. A constant: how a token's keys are divided must not depend on its batch."""
MIN_CHUNK_TOKENS = 256
"""Fewer do not fill the GPU with whole tokens."""
MIN_READS = 8
"""Reads of a row, on average, that pay for widening it."""
MAX_TABLE_BYTES = 1 << 27


def fits_hopper(q_THD: Tensor, window: PackedRows, index: BatchIndex) -> bool:
    """Whether the shapes and this machine can run the Hopper kernels."""
    if (
        not q_THD.is_cuda
        or tuple(q_THD.shape[1:]) != (HEADS, CHANNELS)
        or window.format != "kv_fp8"
        or window.rope_dim != ROPE
        or window.rows & (window.rows - 1)
        or index.page_tokens & (index.page_tokens - 1)
    ):
        return False
    try:
        cuda_build.load("sparse_attention")
    except cuda_build.CudaUnavailable:
        return False
    return bool(q_THD.dtype == torch.bfloat16)


def most_parts(num_keys: int, window_rows: int, part_tiles: int = PART_TILES) -> int:
    """Parts of a token's keys: the window, and num_keys entries at most."""
    tiles = -(-window_rows // TILE_KEYS) - (-num_keys // TILE_KEYS)
    return -(-tiles // part_tiles)


def table_rows(index: BatchIndex, window_rows: int, rows_per_page: int) -> int:
    """Rows of the widened table. rows_per_page: entries of a page, 0 without any."""
    most_entries = int(index.page_table.shape[1]) * rows_per_page
    return index.num_requests * (window_rows + most_entries) + index.num_tokens


def widening_pays(index: BatchIndex, window_rows: int, num_listed: int, rows_per_page: int) -> bool:
    """Whether a pass should widen its rows first. num_listed: entries listed for each token, 0 if it sees all.

    Decided by shapes alone, so that nothing waits for the device.
    """
    rows, reads = table_rows(index, window_rows, rows_per_page), index.num_tokens * (window_rows + num_listed)
    enough = index.num_tokens >= MIN_CHUNK_TOKENS and not index.one_token_each
    return enough and MIN_READS * rows <= reads and 2 * CHANNELS * rows <= MAX_TABLE_BYTES


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
    angles: tuple[Tensor, Tensor] | None = None,
    *,
    widened: bool | None = None,
    part_tiles: int = PART_TILES,
) -> Tensor | QuantizedRows:
    """kernels.sparse_attention.sparse_attention for the released size, or sparse_attention_for_fp8, with angles.
    `widened` and `part_tiles` are for tests and benches."""
    num_tokens, num_heads, width = q_THD.shape
    device = q_THD.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    output = empty(num_tokens, num_heads, width, dtype=q_THD.dtype if angles is None else torch.float8_e4m3fn)
    # Group-major, as QuantizedRows has them.
    scales = empty(num_heads * width // SCALE_GROUP if angles else 0, scale_stride(num_tokens))
    result = output if angles is None else QuantizedRows(output.flatten(1), scales)
    if not num_tokens:
        return result
    rows_per_page = index.page_tokens // ratio if entries is not None else 0
    entries, selected, every = entries_of(entries, selected_TK, window, num_tokens)
    listed = selected.shape[1]
    if widened is None:
        widened = widening_pays(index, window.rows, listed, rows_per_page)
    if widened:
        part_tiles = 1 << 30
    most = int(index.page_table.shape[1]) * rows_per_page if every else listed
    splits = most_parts(most, window.rows, part_tiles)
    table = empty(table_rows(index, window.rows, rows_per_page) if widened else 0, width, dtype=torch.bfloat16)
    shape = (num_tokens, splits, num_heads) if splits > 1 else (0, 0, 0)
    parts, tops, norms = empty(*shape, width), empty(*shape), empty(*shape)
    cosines, sines = angles or (scales, scales)
    rows: list[Tensor] = []
    for pool in (window, chunk, entries):
        assert pool.scales is not None
        rows += (pool.data, pool.scales)
    plain, codes = (output, scales[:0]) if angles is None else (scales[:0], output)
    tensors = (
        q_THD, sink_H, plain, codes, scales, cosines, sines, parts, tops, norms, table, index.token_request_T,
        index.positions_T, index.query_start, index.context_len_B, index.slot_ids_B, index.page_table, selected, *rows,
    )  # fmt: skip
    ring, ring_scales, new, new_scales, pages, page_scales = rows
    strides = (
        q_THD.stride(0), ring.stride(0), ring_scales.stride(0), ring.stride(1), ring_scales.stride(1), new.stride(1),
        new_scales.stride(1), pages.stride(0), page_scales.stride(0), pages.stride(1), page_scales.stride(1),
        scales.stride(0),
    )  # fmt: skip
    integers = (
        index.page_table.stride(0), selected.stride(0), window.rows, listed, max(1, rows_per_page),
        ratio if every else 0, max(1, ratio), max(1, rows_per_page).bit_length() - 1, num_tokens, index.num_requests,
        index.page_table.shape[1] * rows_per_page, splits, part_tiles,
    )  # fmt: skip
    name = "chunk_attention" if widened else "sparse_attention"
    error = getattr(cuda_build.load(name), name)(
        (c_void_p * len(tensors))(*(tensor.data_ptr() if tensor.numel() else None for tensor in tensors)),
        (c_int64 * len(strides))(*strides),
        (c_int * len(integers))(*integers),
        c_float(scale * LOG2E),
        num_multiprocessors(device),
        cuda_build.stream(device),
    )
    cuda_build.check(error, f"{name}({num_tokens} tokens, {window.rows} + {listed} keys, {splits} parts)")
    if splits > 1:
        window_tiles = -(-window.rows // TILE_KEYS)
        division = Division(index.positions_T, TILE_KEYS, window_tiles, listed, ratio if every else 0, part_tiles)
        join_parts(parts, tops, norms, sink_H, output, scales, angles, division)
    return result


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
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor | QuantizedRows:
    """kernels.sparse_attention.sparse_attention, or with angles sparse_attention_for_fp8, by the fastest kernel that
    fits."""
    if fits_hopper(q_THD, window, index):
        return sparse_attention_hopper(
            q_THD, chunk, window, sink_H, index, scale, entries, selected_TK, ratio, angles
        )  # fmt: skip
    return sparse_attention_triton(q_THD, chunk, window, sink_H, index, scale, entries, selected_TK, ratio)
