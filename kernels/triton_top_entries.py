"""The K best-scored entries of every token (specification: kernels.indexer.top_entries_ref, but in ascending order).

T tokens, L entries, of which a token sees the first v. The threshold is found bit by bit: scores become integers
in the same order, and each round, 32 at most, counts how many reach a trial threshold. One scan then gives every chosen
entry its place; of equal scores the lowest entries are taken. A token that sees at most K entries gets them all,
its scores are not read. Output: int32 [T, K], ascending, then -1.

A program holds SEGMENT scores; longer rows are cut into segments, each yields its K best, and a second launch picks
among those. Bound by memory at prefill, by latency at decode.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 8192
SMALL = 2048
"""Rows no longer than this take a quarter of the work."""


@triton.jit
def _choose(values, numbers, known, output, kept_scores, TOPK: tl.constexpr, KEEP: tl.constexpr):
    """Writes the numbers (and, if KEEP, the scores) of the TOPK best of the known values, in order, then -1."""
    values = tl.where(values == 0.0, 0.0, values)  # -0 equals 0
    bits = values.to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(known, key, 0).to(tl.uint32)
    top = tl.max(key, axis=0)
    span = top ^ tl.min(tl.where(known, key, top), axis=0)
    for shift in tl.static_range(5):
        span |= span >> (1 << shift)
    # All keys agree above the highest bit of the span. Below it the threshold takes every bit that leaves TOPK keys or
    # more, until it leaves exactly TOPK.
    threshold = top & (span ^ 0xFFFFFFFF)
    step = span ^ (span >> 1)
    count = TOPK + 1
    while (step != 0) & (count != TOPK):
        trial = threshold | step
        reach = tl.sum((key >= trial).to(tl.int32), axis=0)
        threshold = tl.where(reach >= TOPK, trial, threshold)
        count = tl.where(reach >= TOPK, reach, count)
        step = step >> 1
    above = (key > threshold) & known
    level = (key == threshold) & known
    spare = TOPK - tl.sum(above.to(tl.int32), axis=0)
    # Both counts in one scan: chosen ones in the low half, equal ones in the high half.
    pair = above.to(tl.int32) + (level.to(tl.int32) << 16)
    before = tl.cumsum(pair, axis=0) - pair
    equal = before >> 16
    chosen = above | (level & (equal < spare))
    place = (before & 0xFFFF) + tl.minimum(equal, spare)
    tl.store(output + place, numbers, mask=chosen)
    if KEEP:
        tl.store(kept_scores + place, values, mask=chosen)
    total = tl.sum(chosen.to(tl.int32), axis=0)
    rest = tl.arange(0, triton.next_power_of_2(TOPK))
    tl.store(output + rest, tl.full(rest.shape, -1, tl.int32), mask=(rest >= total) & (rest < TOPK))


@triton.jit
def _choose_entries(
    scores, start, left, output, kept_scores, TOPK: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    known = at < left
    values = tl.load(scores + start + at, mask=known, other=0.0)
    _choose(values, start + at, known, output, kept_scores, TOPK, KEEP)


@triton.jit
def _segment_kernel(
    scores, positions, output, candidates, candidate_scores, ratio, stride_scores,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    token, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seen = (tl.load(positions + token).to(tl.int32) + 1) // ratio
    start = segment * BLOCK
    left = tl.minimum(seen - start, BLOCK)
    rest = tl.arange(0, triton.next_power_of_2(TOPK))
    row = scores + token * stride_scores
    if seen <= TOPK:
        if segment == 0:
            tl.store(output + token * TOPK + rest, tl.where(rest < seen, rest, -1), mask=rest < TOPK)
    elif seen <= BLOCK:
        if segment == 0:
            if seen <= SMALL:
                _choose_entries(row, 0, seen, output + token * TOPK, candidate_scores, TOPK, SMALL, False)
            else:
                _choose_entries(row, 0, seen, output + token * TOPK, candidate_scores, TOPK, BLOCK, False)
    elif SEGMENTS > 1:
        place = (token * SEGMENTS + segment) * TOPK
        _choose_entries(row, start, left, candidates + place, candidate_scores + place, TOPK, BLOCK, True)


@triton.jit
def _join_kernel(
    candidates, candidate_scores, positions, output, ratio, segment_size,
    TOPK: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if (tl.load(positions + token).to(tl.int32) + 1) // ratio > segment_size:
        at = tl.arange(0, BLOCK)
        numbers = tl.load(candidates + token * COUNT + at, mask=at < COUNT, other=-1)
        values = tl.load(candidate_scores + token * COUNT + at, mask=numbers >= 0, other=0.0)
        _choose(values, numbers, numbers >= 0, output + token * TOPK, candidate_scores, TOPK, False)


def _warps(scores: int) -> int:
    """A power of two: about sixteen scores a thread."""
    return 4 if scores <= 2048 else 8 if scores <= 4096 else 16


def top_entries(
    scores_TL: Tensor, positions_T: Tensor, ratio: int, topk: int, output_TK: Tensor, segment: int = SEGMENT
) -> None:
    """Into output int32 [T, topk], contiguous: the best of the first (p + 1) // ratio entries, of which there are at
    most L. `segment`, a power of two, is for tests."""
    num_tokens, most = scores_TL.shape
    if not num_tokens:
        return
    block = min(segment, triton.next_power_of_2(most))
    segments = triton.cdiv(most, block)
    shape = (num_tokens, segments, topk) if segments > 1 else (0,)
    candidates = torch.empty(shape, dtype=torch.int32, device=scores_TL.device)
    candidate_scores = torch.empty(shape, dtype=torch.float32, device=scores_TL.device)
    _segment_kernel[(num_tokens, segments)](
        scores_TL, positions_T, output_TK, candidates, candidate_scores, ratio, scores_TL.stride(0), TOPK=topk,
        BLOCK=block, SMALL=min(SMALL, block), SEGMENTS=segments, num_warps=_warps(block),
    )  # fmt: skip
    if segments > 1:
        count = segments * topk
        _join_kernel[(num_tokens,)](
            candidates, candidate_scores, positions_T, output_TK, ratio, block, TOPK=topk, COUNT=count,
            BLOCK=triton.next_power_of_2(count), num_warps=_warps(count),
        )  # fmt: skip
