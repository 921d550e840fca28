"""Truncation without sorting, and the draw, in Triton (specification: kernels.sampling).

A row's scaled logits are at most 0, so the bits of their magnitudes, 31 bit integers m, grow as logits fall, and a
truncation is the largest m that is kept. It is found three bits at a time: a pass over the row counts the logits
(top-k) or adds up the weights (top-p) below seven trial values, each thread for itself until the end of the pass. A
program takes a row. The draw is a pass for the sum and one until the sum passes the target.

Weights of a trial are added in float32 per thread and in float64 across threads: a logit whose exclusive sum is within
1e-6 of top_p may fall on the other side than in the twin. Bound by memory: 11 passes for each of top-k and top-p where
they are on, two for the draw; at small batches by one multiprocessor's share of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import Truncation

BLOCK = 2048
NOTHING = 0x7F800000
"""Bits of infinity: every finite logit is kept."""


@triton.jit
def _magnitudes(row, at, best, temperature, lowest, vocabulary):
    """Bits int32 of the scaled logits' magnitudes; infinity beyond the row, under min-p and for what is no number."""
    inside = at < vocabulary
    scaled = (tl.load(row + at, mask=inside, other=float("-inf")) - best) / temperature
    bits = tl.abs(scaled).to(tl.int32, bitcast=True)
    return tl.where(inside & (scaled >= lowest) & (bits < 0x7F800000), bits, 0x7F800000)


@triton.jit
def _weights(bits):
    return tl.where(bits < 0x7F800000, tl.exp(-bits.to(tl.float32, bitcast=True)), 0.0)


@triton.jit
def _logarithm(share):
    return tl.where(share > 0.0, tl.log(tl.maximum(share, 1e-38)), float("-inf"))


@triton.jit
def _keep_kernel(
    logits, best, rows, temperature, min_p, members, top_k, top_p, keep, vocabulary, stride_logits,
    MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    member = tl.load(members + number)
    source = tl.load(rows + member)
    row = logits + source * stride_logits
    largest, heat = tl.load(best + source), tl.load(temperature + member)
    lowest = _logarithm(tl.load(min_p + member)) if MIN_P else float("-inf")
    k, p = tl.load(top_k + number), tl.load(top_p + number)
    lane, digit = tl.arange(0, BLOCK), tl.arange(0, 8)

    # Top-k: the smallest bound with k logits at or under it. Ranges of 8^n values, from 2^30 down.
    bound = tl.full((), 0, tl.int32)
    for turn in range(tl.where(k < vocabulary, 11, 0)):
        shift = 30 - 3 * turn
        # The last value of each of eight ranges; the first pass has two, and the sum stays within 31 bits.
        last = bound + (digit << shift) + ((1 << shift) - 1)
        counted = digit < tl.where(turn == 0, 1, 7)
        counts = tl.zeros((BLOCK, 8), tl.int32)
        for start in range(0, vocabulary, BLOCK):
            bits = _magnitudes(row, start + lane, largest, heat, lowest, vocabulary)
            counts += (bits[:, None] <= last[None, :]).to(tl.int32)
        short = counted & (tl.sum(counts, axis=0) < k)
        bound += tl.sum(short.to(tl.int32), axis=0) << shift
    bound = tl.where(k < vocabulary, tl.minimum(bound, 0x7F800000), 0x7F800000)

    if p < 1.0:
        inside = tl.zeros((BLOCK,), tl.float32)
        count = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocabulary, BLOCK):
            bits = _magnitudes(row, start + lane, largest, heat, lowest, vocabulary)
            inside += tl.where(bits < bound, _weights(bits), 0.0)
            count += (bits < bound).to(tl.int32)
        level = _weights(bound).to(tl.float64)
        # Of the logits that tie with the k-th, top-k counts only as many as make k.
        ties = tl.where(k < vocabulary, k - tl.sum(count, axis=0), 0).to(tl.float64)
        target = p * (tl.sum(inside.to(tl.float64), axis=0) + ties * level)
        # Top-p: the largest bound with less than the target strictly above the logit.
        kept = tl.full((), 0, tl.int32)
        for turn in range(11):
            shift = 30 - 3 * turn
            first = kept + (digit << shift)
            tried = (digit > 0) & (digit < tl.where(turn == 0, 2, 8))
            sums = tl.zeros((BLOCK, 8), tl.float32)
            for start in range(0, vocabulary, BLOCK):
                bits = _magnitudes(row, start + lane, largest, heat, lowest, vocabulary)
                sums += tl.where(bits[:, None] < first[None, :], _weights(bits)[:, None], 0.0)
            under = tried & (tl.sum(sums.to(tl.float64), axis=0) < target)
            kept += tl.sum(under.to(tl.int32), axis=0) << shift
        bound = tl.minimum(bound, kept)
    tl.store(keep + member, bound)


@triton.jit
def _draw_kernel(
    logits, best, rows, temperature, uniform, min_p, keep, output, vocabulary, stride_logits,
    MIN_P: tl.constexpr, TRUNCATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(0)
    source = tl.load(rows + member)
    row = logits + source * stride_logits
    largest, heat = tl.load(best + source), tl.load(temperature + member)
    lowest = _logarithm(tl.load(min_p + member)) if MIN_P else float("-inf")
    bound = tl.load(keep + member) if TRUNCATED else 0x7F800000
    lane = tl.arange(0, BLOCK)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, vocabulary, BLOCK):
        bits = _magnitudes(row, start + lane, largest, heat, lowest, vocabulary)
        total += tl.sum(tl.where(bits <= bound, _weights(bits), 0.0).to(tl.float64), axis=0)
    target = tl.load(uniform + member) * total
    passed = tl.full((), 0.0, tl.float64)
    token = tl.full((), -1, tl.int32)
    last = tl.full((), -1, tl.int32)
    start = tl.full((), 0, tl.int32)
    while (start < vocabulary) & (token < 0):
        at = start + lane
        bits = _magnitudes(row, at, largest, heat, lowest, vocabulary)
        weight = tl.where(bits <= bound, _weights(bits), 0.0).to(tl.float64)
        here = tl.sum(weight, axis=0)
        # Rounding may leave a block's running sum short of its sum: then its last token of any weight is the one.
        final = tl.max(tl.where(weight > 0.0, at, -1), axis=0)
        if passed + here > target:
            reached = passed + tl.cumsum(weight, axis=0) > target
            token = tl.min(tl.where(reached & (weight > 0.0), at, vocabulary), axis=0)
            token = tl.where(token < vocabulary, token, final)
        last = tl.where(final >= 0, final, last)
        passed += here
        start += BLOCK
    token = tl.where(token < 0, last, token)
    tl.store(output + member, tl.where(token < 0, vocabulary - 1, token).to(tl.int64))


def draw_triton(
    logits_BV: Tensor,
    best_B: Tensor,
    rows_R: Tensor,
    temperature_R: Tensor,
    uniform_R: Tensor,
    min_p_R: Tensor | None,
    truncation: Truncation | None,
) -> Tensor:
    """kernels.sampling.draw for logits with contiguous rows."""
    count, vocabulary = rows_R.shape[0], logits_BV.shape[1]
    output = torch.empty(count, dtype=torch.int64, device=logits_BV.device)
    if not count:
        return output
    min_p = temperature_R if min_p_R is None else min_p_R
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    keep = output
    if truncation is not None:
        keep = torch.full((count,), NOTHING, dtype=torch.int32, device=logits_BV.device)
        if truncation.rows_S.shape[0]:
            _keep_kernel[(truncation.rows_S.shape[0],)](
                logits_BV, best_B, rows_R, temperature_R, min_p, truncation.rows_S, truncation.top_k_S,
                truncation.top_p_S, keep, vocabulary, logits_BV.stride(0), MIN_P=min_p_R is not None,
                BLOCK=min(block, 1024), num_warps=8,
            )  # fmt: skip
    _draw_kernel[(count,)](
        logits_BV, best_B, rows_R, temperature_R, uniform_R, min_p, keep, output, vocabulary, logits_BV.stride(0),
        MIN_P=min_p_R is not None, TRUNCATED=truncation is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return output
