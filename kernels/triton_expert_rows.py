"""Rows of the routed experts: sort tokens by local expert, quantise and copy them there, add results back.

T tokens, D hidden, K experts a token, E local experts [first, first + E), R = T K row slots. Rows of one expert are
consecutive; their order inside an expert is arbitrary and changes nothing, since every row is computed by itself.
Bound by memory and, at decode, by launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import INTERPRET, power_of_two_scale, to_bf16, to_e4m3
from kernels.triton_quantize import QuantizedRows, scale_stride

GROUP = 128
ENTRIES = 1024


class ExpertRows(NamedTuple):
    """Where every (token, choice) went."""

    offsets_E: Tensor
    """int32 [E + 1]: rows of expert e are offsets[e] .. offsets[e + 1]."""
    row_TK: Tensor
    """int32: row of each choice, -1 where its expert lives elsewhere."""


@triton.jit
def _count_kernel(experts, counts, num_entries, first, num_experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(experts + entry, mask=entry < num_entries, other=-1).to(tl.int32) - first
    local = tl.where((local >= 0) & (local < num_experts), local, num_experts)
    histogram = tl.histogram(local, BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts + bins, histogram, mask=(bins < num_experts) & (histogram > 0), sem="relaxed")


@triton.jit
def _offsets_kernel(counts, offsets, cursor, num_experts, BINS: tl.constexpr):
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins, mask=bins < num_experts, other=0)
    start = tl.cumsum(count, 0) - count
    tl.store(offsets + bins, start, mask=bins <= num_experts)
    tl.store(cursor + bins, start, mask=bins < num_experts)


@triton.jit
def _place_kernel(experts, cursor, rows, num_entries, first, num_experts, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < num_entries
    local = tl.load(experts + entry, mask=inside, other=-1).to(tl.int32) - first
    mine = inside & (local >= 0) & (local < num_experts)
    row = tl.atomic_add(cursor + tl.where(mine, local, 0), 1, mask=mine, sem="relaxed")
    tl.store(rows + entry, tl.where(mine, row, -1), mask=inside)


def sort_by_expert(experts_TK: Tensor, first: int, num_experts: int) -> ExpertRows:
    """experts_TK int32 or int64, global expert numbers, contiguous."""
    device, num_entries = experts_TK.device, experts_TK.numel()
    work = torch.zeros(3 * (num_experts + 1), dtype=torch.int32, device=device)
    counts, offsets, cursor = work.view(3, num_experts + 1)
    rows = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    if num_entries:
        bins, grid = triton.next_power_of_2(num_experts + 1), (triton.cdiv(num_entries, ENTRIES),)
        _count_kernel[grid](experts_TK, counts, num_entries, first, num_experts, BINS=bins, BLOCK=ENTRIES)
        _offsets_kernel[(1,)](counts, offsets, cursor, num_experts, BINS=bins, num_warps=1)
        _place_kernel[grid](experts_TK, cursor, rows, num_entries, first, num_experts, BLOCK=ENTRIES)
    return ExpertRows(offsets, rows)


@triton.jit
def _quantize_rows_kernel(
    x, rows, weights, codes, scales, route_weight, stride_x, stride_codes, stride_scales,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    groups: tl.constexpr = BLOCK // 128
    column = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.reshape(tl.load(x + token * stride_x + column).to(tl.float32), (groups, 128))
    amax = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-4)
    scale = power_of_two_scale(amax, 1.0 / 448.0)
    code = tl.reshape(to_e4m3(value * (1.0 / scale)[:, None], INTERPRET), (BLOCK,))
    group = part * groups + tl.arange(0, groups)
    for choice in tl.static_range(CHOICES):
        row = tl.load(rows + token * CHOICES + choice).to(tl.int64)
        if row >= 0:
            tl.store(codes + row * stride_codes + column, code)
            tl.store(scales + group.to(tl.int64) * stride_scales + row, scale)
            if part == 0:
                tl.store(route_weight + row, tl.load(weights + token * CHOICES + choice))


def quantize_rows(x_TD: Tensor, weights_TK: Tensor, rows: ExpertRows) -> tuple[QuantizedRows, Tensor]:
    """x bf16 or float32 [T, D], D a multiple of 128 -> (rows of the local experts, float32 [R] routing weight of each).

    Rows that no token fills keep whatever the allocator left there."""
    (num_tokens, hidden), choices = x_TD.shape, weights_TK.shape[1]
    if hidden % GROUP:
        raise ValueError(f"hidden={hidden}: expert inputs are quantised in groups of {GROUP}")
    num_rows = num_tokens * choices
    codes = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scales = torch.empty(hidden // GROUP, scale_stride(num_rows), dtype=torch.float32, device=x_TD.device)
    route_weight = torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    if num_tokens:
        block = next(size for size in (1024, 512, 256, 128) if hidden % size == 0)
        _quantize_rows_kernel[(num_tokens, hidden // block)](
            x_TD, rows.row_TK, weights_TK, codes, scales, route_weight, x_TD.stride(0), codes.stride(0),
            scales.stride(0), CHOICES=choices, BLOCK=block, INTERPRET=INTERPRET,
        )  # fmt: skip
    return QuantizedRows(codes, scales), route_weight


@triton.jit
def _combine_kernel(
    y, rows, shared, output, hidden, stride_y, stride_shared, stride_output,
    CHOICES: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(rows + token * CHOICES + choice).to(tl.int64)
        if row >= 0:
            total += tl.load(y + row * stride_y + column, mask=inside, other=0.0).to(tl.float32)
    if SHARED:
        total += tl.load(shared + token * stride_shared + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + token * stride_output + column, to_bf16(total, INTERPRET), mask=inside)
    else:
        tl.store(output + token * stride_output + column, total, mask=inside)


def combine_rows(y_RD: Tensor, rows: ExpertRows, shared_TD: Tensor | None = None) -> Tensor:
    """Sum of each token's rows in the order of its choices, float32 [T, D]; with the shared expert's output, bf16."""
    (num_tokens, choices), hidden = rows.row_TK.shape, y_RD.shape[1]
    dtype = torch.float32 if shared_TD is None else torch.bfloat16
    output = torch.empty(num_tokens, hidden, dtype=dtype, device=y_RD.device)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(hidden))
        shared = y_RD if shared_TD is None else shared_TD
        _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
            y_RD, rows.row_TK, shared, output, hidden, y_RD.stride(0), shared.stride(0), output.stride(0),
            CHOICES=choices, SHARED=shared_TD is not None, BLOCK=block, INTERPRET=INTERPRET,
        )  # fmt: skip
    return output
