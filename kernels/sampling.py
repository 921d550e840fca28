"""One token per row by inverse transform: temperature, min-p, top-k, top-p, one uniform number.

B rows of logits, V vocabulary, R of the rows drawn, S of those truncated by top-k or top-p. scaled = (logit - best) /
temperature, so that the largest weight, exp(scaled), is exactly 1. min-p drops scaled < log(min_p). Top-k keeps the k
largest, top-p as many of the largest of those as it takes to reach top_p of their sum, at least one; both are lower
bounds on the logit, so equal logits stand or fall together. The token is the first whose cumulative weight, in order of
ids, exceeds uniform * sum. Weights are float32, sums float64. A row's token depends on no other row.
Bound by memory: passes over the drawn rows' logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import use_triton

NEGATIVE_INFINITY = float("-inf")


class Truncation(NamedTuple):
    """Rows with top-k or top-p."""

    rows_S: Tensor
    """int64, indices into the R drawn rows."""
    top_k_S: Tensor
    """int64, V = off."""
    top_p_S: Tensor
    """float64, 1 = off."""
    max_top_k: int
    """The largest of top_k."""


def draw_ref(
    logits_BV: Tensor,
    best_B: Tensor,
    rows_R: Tensor,
    temperature_R: Tensor,
    uniform_R: Tensor,
    min_p_R: Tensor | None,
    truncation: Truncation | None,
) -> Tensor:
    scaled = (logits_BV[rows_R] - best_B[rows_R, None]) / temperature_R[:, None]
    if min_p_R is not None:
        scaled.masked_fill_(scaled < min_p_R.log()[:, None], NEGATIVE_INFINITY)
    if truncation is not None:
        kept = scaled[truncation.rows_S]
        bound = _sorted_bound(kept, truncation)
        scaled[truncation.rows_S] = kept.masked_fill(kept < bound, NEGATIVE_INFINITY)
    cumulative = scaled.exp_().cumsum(dim=-1, dtype=torch.float64)
    target = uniform_R[:, None] * cumulative[:, -1:]
    # The first id whose cumulative weight exceeds the target; ids of weight 0 are never that.
    token_ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # A row of NaN finds nothing; its `best` says so, the index must only stay inside.
    return token_ids.clamp_(max=logits_BV.shape[-1] - 1)


def _sorted_bound(scaled_SV: Tensor, truncation: Truncation) -> Tensor:
    """float32 [S, 1]: the smallest logit that top-k, then top-p among those k, keep."""
    if truncation.max_top_k < scaled_SV.shape[-1]:
        ordered = scaled_SV.topk(truncation.max_top_k, dim=-1).values
    else:
        ordered = scaled_SV.sort(dim=-1, descending=True).values
    place = torch.arange(ordered.shape[-1], device=scaled_SV.device)
    ordered = ordered.masked_fill(place >= truncation.top_k_S[:, None], NEGATIVE_INFINITY)
    weight = ordered.exp().double()
    before = weight.cumsum(dim=-1) - weight
    # Kept: as many of the largest as it takes to reach top_p, hence at least one.
    kept = (before < truncation.top_p_S[:, None] * weight.sum(dim=-1, keepdim=True)) & (weight > 0)
    last = kept.sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    return ordered.gather(-1, last)


def draw(
    logits_BV: Tensor,
    best_B: Tensor,
    rows_R: Tensor,
    temperature_R: Tensor,
    uniform_R: Tensor,
    min_p_R: Tensor | None,
    truncation: Truncation | None,
) -> Tensor:
    """logits float32 [B, V], best float32 [B] their maxima, rows int64 [R], temperature float32 [R] > 0, uniform
    float64 [R] in [0, 1), min_p float32 [R] with 0 = off -> int64 [R]. Rows without a finite maximum get some id."""
    if use_triton(logits_BV):
        from kernels.triton_sampling import draw_triton

        return draw_triton(logits_BV, best_B, rows_R, temperature_R, uniform_R, min_p_R, truncation)
    return draw_ref(logits_BV, best_B, rows_R, temperature_R, uniform_R, min_p_R, truncation)
