"""The indexer's selection on the GPU: scores, then the best entries (specification: indexer.select_entries_ref).

Shapes depend on the width of the page table alone, nothing is read back: a CUDA graph can hold it. Scores live in a
workspace of bounded size, so long chunks over long histories go in pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.indexer import all_entries
from kernels.packed_rows import PackedRows
from kernels.triton_index_scores import index_scores
from kernels.triton_top_entries import top_entries

MAX_SCORES = 1 << 26
"""float32 scores held at once."""


def select_entries_triton(
    q_THD: Tensor, weights_TH: Tensor, keys: PackedRows, index: BatchIndex, ratio: int, topk: int
) -> Tensor:
    """kernels.indexer.select_entries; entries ascend, the width is `topk` or what the page table can name if less."""
    num_tokens = index.num_tokens
    most = index.page_table.shape[1] * (index.page_tokens // ratio)
    if most <= topk:
        return all_entries(index, ratio)
    selected = torch.empty(num_tokens, topk, dtype=torch.int32, device=q_THD.device)
    piece = max(1, MAX_SCORES // most)
    scores = torch.empty(min(piece, num_tokens), most, dtype=torch.float32, device=q_THD.device)
    for first in range(0, num_tokens, piece):
        part = slice(first, min(first + piece, num_tokens))
        here = scores[: part.stop - first]
        index_scores(q_THD, weights_TH, keys, index, ratio, topk, here, first)
        top_entries(here, index.positions_T[part], ratio, topk, selected[part])
    return selected
