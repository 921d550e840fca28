"""The lightning indexer on the GPU: Hopper kernels where they fit, Triton elsewhere (specification: kernels.indexer).

The Hopper kernels take 64 heads of 128 channels, bf16 queries, and MXFP4 or FP8 keys under the released rounding.
Queries are kept as e4m3 with a power of two per head, in the order in which the scores' tensor-core products take them.
An e2m1 value is an e4m3 value, and the four groups of a head (or key) share one power of two exactly while their scales
lie within 2^14; what a group further below loses is under 2^-14 of the largest value, as is what such a product drops.

Shapes depend on the width of the page table alone, nothing is read back: a CUDA graph can hold it. Scores live in a
workspace of bounded size, so long chunks over long histories go in pieces.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.batch_index import BatchIndex
from kernels.indexer import PackedQuery, all_entries
from kernels.packed_rows import PackedRows
from kernels.triton_fp8_gemm import num_multiprocessors
from kernels.triton_index_scores import index_scores
from kernels.triton_top_entries import top_entries

MAX_SCORES = 1 << 26
"""float32 scores held at once."""

HEADS, WIDTH, ROTARY = 64, 128, 64
TILE_KEYS = 64
RECORDS = {"key_mxfp4": (WIDTH // 2, WIDTH // 32), "key_fp8": (WIDTH, 1)}
"""Elements of a key's data and scales, by format."""
CTAS_PER_MULTIPROCESSOR = 4
"""That compute scores of few tokens at a time."""
MANY_TOKENS = 6
"""Tokens a multiprocessor from which neighbours share their keys."""


def fits_hopper(query_THD: Tensor, keys: PackedRows, rotary: int) -> bool:
    """Whether the shapes and this machine can run the Hopper kernels. `rotary`: channels that are rotated."""
    if (
        not query_THD.is_cuda
        or query_THD.dtype != torch.bfloat16
        or tuple(query_THD.shape[1:]) != (HEADS, WIDTH)
        or query_THD.stride()[1:] != (WIDTH, 1)
        or rotary != ROTARY
        or keys.format not in RECORDS
    ):
        return False
    assert keys.scales is not None
    record, scale_record = RECORDS[keys.format]
    pages = (keys.data.stride(0), keys.scales.stride(0) * keys.scales.element_size())
    aligned = (query_THD.data_ptr(), 2 * query_THD.stride(0), keys.data.data_ptr(), keys.scales.data_ptr(), *pages)
    if (
        keys.rows < 16
        or keys.rows & (keys.rows - 1)
        or keys.data.stride(1) != record
        or keys.scales.stride(1) != scale_record
        or any(place % 16 for place in aligned)
    ):
        return False
    return _loads("index_query", "index_scores")


def top_fits_hopper(scores_TL: Tensor, topk: int) -> bool:
    """Whether these rows of scores and this machine can run the Hopper kernel."""
    most, stride = scores_TL.shape[1], scores_TL.stride(0)
    aligned = not (most % 4 or stride % 4 or scores_TL.data_ptr() % 16)
    return scores_TL.is_cuda and aligned and topk < 2048 and most < 1 << 20 and _loads("top_entries")


def _loads(*names: str) -> bool:
    try:
        for name in names:
            cuda_build.load(name)
    except cuda_build.CudaUnavailable:
        return False
    return True


def index_query_hopper(query_THD: Tensor, angles: tuple[Tensor, Tensor], keys: PackedRows) -> PackedQuery:
    """kernels.indexer.index_query with `simulate`, packed. Angles are contiguous."""
    num_tokens, device = query_THD.shape[0], query_THD.device
    codes = torch.empty(num_tokens, HEADS * WIDTH, dtype=torch.uint8, device=device)
    scales = torch.empty(num_tokens, HEADS, dtype=torch.float32, device=device)
    if num_tokens:
        address = cuda_build.address
        error = cuda_build.load("index_query").index_query(
            int(keys.format == "key_fp8"), address(query_THD), c_int64(query_THD.stride(0)), address(angles[0]),
            address(angles[1]), address(codes), address(scales), num_tokens, cuda_build.stream(device),
        )  # fmt: skip
        cuda_build.check(error, f"index_query({num_tokens} tokens)")
    return PackedQuery(codes, scales)


def splits_for(num_tokens: int, num_keys: int, multiprocessors: int, *, alone: bool) -> int:
    """CTAs that share the keys of one token; 0: neighbouring tokens share theirs, which they cannot if `alone`."""
    if not alone and num_tokens >= MANY_TOKENS * multiprocessors:
        return 0
    return max(1, min(CTAS_PER_MULTIPROCESSOR * multiprocessors // num_tokens, -(-num_keys // TILE_KEYS)))


def index_scores_hopper(
    query: PackedQuery,
    weights_TH: Tensor,
    keys: PackedRows,
    index: BatchIndex,
    ratio: int,
    topk: int,
    scores_NL: Tensor,
    first_token: int,
    splits: int | None = None,
) -> None:
    """As triton_index_scores.index_scores; a score has the same bits for any `splits`, which is for tests."""
    num_tokens, most = scores_NL.shape
    device = scores_NL.device
    assert keys.scales is not None
    if splits is None:
        splits = splits_for(num_tokens, most, num_multiprocessors(device), alone=index.one_token_each)
    part = slice(first_token, first_token + num_tokens)
    tensors = (
        query.codes[part], query.scales_TH[part], weights_TH[part], keys.data, keys.scales, index.token_request_T[part],
        index.positions_T[part], index.page_table, scores_NL,
    )  # fmt: skip
    strides = (
        weights_TH.stride(0), keys.data.stride(0), keys.scales.stride(0) * keys.scales.element_size(),
        scores_NL.stride(0),
    )  # fmt: skip
    integers = (
        index.page_table.stride(0), keys.rows.bit_length() - 1, ratio, topk, num_tokens, int(keys.format == "key_fp8"),
        splits, num_multiprocessors(device),
    )  # fmt: skip
    error = cuda_build.load("index_scores").index_scores(
        (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors)),
        (c_int64 * len(strides))(*strides),
        (c_int * len(integers))(*integers),
        cuda_build.stream(device),
    )
    cuda_build.check(error, f"index_scores({num_tokens} tokens, {most} keys, {splits} splits)")


def top_entries_hopper(
    scores_TL: Tensor, positions_T: Tensor, ratio: int, topk: int, output_TK: Tensor, threads: int | None = None
) -> None:
    """As triton_top_entries.top_entries, where top_fits_hopper. `threads` is for tests."""
    num_tokens, most = scores_TL.shape
    if not num_tokens:
        return
    if threads is None:
        threads = 256 if most <= 4096 else 1024
    error = cuda_build.load("top_entries").top_entries(
        cuda_build.address(scores_TL), c_int64(scores_TL.stride(0)), most, cuda_build.address(positions_T),
        cuda_build.address(output_TK), num_tokens, ratio, topk, threads, cuda_build.stream(scores_TL.device),
    )  # fmt: skip
    cuda_build.check(error, f"top_entries({num_tokens} x {most})")


def select_entries_gpu(
    query: Tensor | PackedQuery, weights_TH: Tensor, keys: PackedRows, index: BatchIndex, ratio: int, topk: int
) -> Tensor:
    """kernels.indexer.select_entries; entries ascend, the width is `topk` or what the page table can name if less."""
    num_tokens = index.num_tokens
    most = index.page_table.shape[1] * (index.page_tokens // ratio)
    if most <= topk:
        return all_entries(index, ratio)
    selected = torch.empty(num_tokens, topk, dtype=torch.int32, device=weights_TH.device)
    piece = max(1, MAX_SCORES // most)
    scores = torch.empty(min(piece, num_tokens), most, dtype=torch.float32, device=weights_TH.device)
    choose = top_entries_hopper if top_fits_hopper(scores, topk) else top_entries
    for first in range(0, num_tokens, piece):
        part = slice(first, min(first + piece, num_tokens))
        here = scores[: part.stop - first]
        if isinstance(query, PackedQuery):
            index_scores_hopper(query, weights_TH, keys, index, ratio, topk, here, first)
        else:
            index_scores(query, weights_TH, keys, index, ratio, topk, here, first)
        choose(here, index.positions_T[part], ratio, topk, selected[part])
    return selected
