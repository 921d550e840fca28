"""Lightning indexer: which compressed entries a token attends to.

T tokens, H index heads, D index channels, K = topk. score(t, j) = sum_h w[t, h] relu(q[t, h] . key_j), float32, over
the entries j < (p + 1) // ratio of the token's request; the K best are taken, ties to the lowest j. Where there are at
most K candidates all are taken and no score is computed. Source: DeepSeek-V4's released program. Bound by the reads of
keys at decode, by the products at prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.dispatch import use_triton
from kernels.hadamard import hadamard
from kernels.packed_rows import PackedRows, read_rows, simulate_row
from kernels.rope import rope
from kernels.row_linear import row_linear

MAX_LOGITS = 1 << 24
"""Head logits the twin holds at once."""


@dataclass(frozen=True, eq=False)
class PackedQuery:
    """Quantised queries of 64 heads x 128 channels as the Hopper kernel takes them: value = e4m3 code * scale."""

    codes: Tensor
    """uint8 [T, H * D], in the order of kernels/cuda/index_query.cu."""
    scales_TH: Tensor
    """float32 powers of two."""


def index_query_ref(query_THD: Tensor, angles: tuple[Tensor, Tensor], keys: PackedRows, *, simulate: bool) -> Tensor:
    query_THD = rope(query_THD, *angles)
    return simulate_row(keys, hadamard(query_THD)) if simulate else query_THD


def index_query(
    query_THD: Tensor, angles: tuple[Tensor, Tensor], keys: PackedRows, *, simulate: bool
) -> Tensor | PackedQuery:
    """Queries [T, H, D] as projected -> rotated and, with `simulate`, Hadamard-transformed and rounded as the keys are.
    The input may be overwritten. What is returned is for select_entries with these keys."""
    if use_triton(query_THD):
        from kernels.gpu_indexer import fits_hopper, index_query_hopper
        from kernels.triton_index_query import fits, index_query_triton

        if simulate and fits_hopper(query_THD, keys, 2 * angles[0].shape[1]):
            return index_query_hopper(query_THD, angles, keys)

        if fits(query_THD, keys):
            return index_query_triton(query_THD, angles, keys, simulate=simulate)
    return index_query_ref(query_THD, angles, keys, simulate=simulate)


def index_scores_ref(q_THD: Tensor, keys_LD: Tensor, weights_TH: Tensor) -> Tensor:
    """One request: -> float32 [T, L]."""
    logits = row_linear(q_THD.flatten(0, 1).float(), keys_LD.float()).relu_().unflatten(0, q_THD.shape[:2])
    return (logits * weights_TH[..., None]).sum(1)


def top_entries_ref(scores_TL: Tensor, candidates_T: Tensor, topk: int) -> Tensor:
    """The `topk` best entries below candidates[t] (> topk each), ties to the lowest: int32 [T, topk]."""
    entry = torch.arange(scores_TL.shape[1], device=scores_TL.device)
    masked = scores_TL.masked_fill(entry >= candidates_T[:, None], -torch.inf)
    return masked.sort(dim=-1, descending=True, stable=True).indices[:, :topk].int()


def all_entries(index: BatchIndex, ratio: int, limit: int | None = None) -> Tensor:
    """int32 [T, K]: every entry visible to each token, -1 beyond; K = the most visible, at most `limit`. On a GPU,
    where asking would wait for it, K = the most that a row of the page table can name."""

    def build() -> Tensor:
        visible = (index.positions_T + 1) // ratio
        if use_triton(visible):
            most = index.page_table.shape[1] * (index.page_tokens // ratio)
        else:
            most = int(visible.max()) if visible.numel() else 0
        entry = torch.arange(most if limit is None else min(most, limit), device=visible.device, dtype=torch.int32)
        return torch.where(entry < visible[:, None], entry, -1)

    return index.cached(("visible", ratio, limit), build)


def select_entries_ref(
    q_THD: Tensor, weights_TH: Tensor, keys: PackedRows, index: BatchIndex, ratio: int, topk: int
) -> Tensor:
    selected = all_entries(index, ratio, topk)
    requests = index.cached(("contested", ratio, topk), lambda: _contested(index, ratio, topk))
    if not requests:
        return selected
    selected = selected.clone()
    for request, start, stop in requests:
        candidates = (index.positions_T[start:stop] + 1) // ratio
        request_keys = _read_keys(keys, index, request, int(candidates[-1]), ratio, q_THD.dtype)
        step = max(1, MAX_LOGITS // (q_THD.shape[1] * request_keys.shape[0]))
        for at in range(start, stop, step):
            until = min(at + step, stop)
            scores = index_scores_ref(q_THD[at:until], request_keys, weights_TH[at:until])
            selected[at:until] = top_entries_ref(scores, candidates[at - start : until - start], topk)
    return selected


def _contested(index: BatchIndex, ratio: int, topk: int) -> list[tuple[int, int, int]]:
    """(request, first row, end row) of the tokens that see more than `topk` entries."""
    first_position = (topk + 1) * ratio - 1
    contested = []
    starts, contexts = index.query_start.tolist(), index.context_len_B.tolist()
    for request, context in enumerate(contexts):
        start, stop = starts[request], starts[request + 1]
        start += max(0, first_position - context)
        if start < stop:
            contested.append((request, start, stop))
    return contested


def _read_keys(keys: PackedRows, index: BatchIndex, request: int, count: int, ratio: int, dtype: torch.dtype) -> Tensor:
    entry = torch.arange(count, device=index.page_table.device)
    page, row = index.entry_location(torch.full_like(entry, request), entry, ratio)
    return read_rows(keys, page, row, dtype)


def select_entries(
    query: Tensor | PackedQuery, weights_TH: Tensor, keys: PackedRows, index: BatchIndex, ratio: int, topk: int
) -> Tensor:
    """query: from index_query, or [T, H, D] rotated (and quantised as the keys are); weights float32 [T, H];
    -> int32 [T, <= topk], -1 = none."""
    if isinstance(query, PackedQuery):
        from kernels.gpu_indexer import select_entries_gpu

        return select_entries_gpu(query, weights_TH, keys, index, ratio, topk)
    if use_triton(query):
        from kernels.gpu_indexer import select_entries_gpu
        from kernels.triton_index_scores import fits

        if fits(query, keys):
            return select_entries_gpu(query, weights_TH, keys, index, ratio, topk)
    return select_entries_ref(query, weights_TH, keys, index, ratio, topk)
