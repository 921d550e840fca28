"""Rows of the routed experts: sort tokens by local expert, quantise and copy them there, add results back.

T tokens, D hidden, K experts a token, E local experts [first, first + E), R = T K + 3 E row slots. Rows of one expert
are consecutive; their order inside an expert is arbitrary and changes nothing, since every row is computed by itself.
Bound by memory and, at decode, by launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.exchange_rows import QuantizedTokens
from kernels.triton_common import INTERPRET, from_exponent_byte, power_of_two_scale, to_bf16, to_e4m3
from kernels.triton_quantize import QuantizedRows, scale_stride

GROUP = 128
ENTRIES = 2048
"""Choices of one program where several sort."""
CHUNK = 32
"""Blocks of choices that are summed up at once."""
MOST_AT_ONCE = 2048
"""Choices that one program sorts in registers; more go faster in three launches."""
ROW_ALIGN = 4
"""An expert's rows begin at a multiple of this: copies of their scales want 16 bytes."""


class ExpertRows(NamedTuple):
    """Where every (token, choice) went."""

    offsets_E: Tensor
    """int32 [E + 1]: rows of expert e are offsets[e] .. offsets[e + 1], multiples of ROW_ALIGN: the last ones may be
    nobody's."""
    row_TK: Tensor
    """int32: row of each choice, -1 where its expert lives elsewhere."""


@triton.jit
def _local_expert(experts, entry, num_entries, first, num_experts, stride, CHOICES: tl.constexpr):
    """Number of each choice's expert among the local ones, and whether it is one of them."""
    inside = entry < num_entries
    place = (entry // CHOICES).to(tl.int64) * stride + entry % CHOICES
    local = tl.load(experts + place, mask=inside, other=-1).to(tl.int32) - first
    mine = inside & (local >= 0) & (local < num_experts)
    return tl.where(mine, local, 0), mine


@triton.jit
def _starts(count):
    """First row of each expert, of a multiple of four rows each."""
    aligned = (count + 3) // 4 * 4
    return tl.cumsum(aligned, 0) - aligned


@triton.jit
def _count_kernel(
    experts, counts, num_entries, first, num_experts, stride,
    CHOICES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each block of entries holds of each expert, and last of experts that live elsewhere."""
    block = tl.program_id(0)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    local, mine = _local_expert(experts, entry, num_entries, first, num_experts, stride, CHOICES)
    bins = tl.arange(0, BINS)
    tl.store(counts + block * BINS + bins, tl.histogram(tl.where(mine, local, num_experts), BINS))


@triton.jit
def _offsets_kernel(counts, offsets, num_blocks, num_experts, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """Counts become those of the blocks before. One program."""
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for begin in range(0, num_blocks, CHUNK):
        block = begin + tl.arange(0, CHUNK)
        place = counts + block[:, None] * BINS + bins[None, :]
        inside = block[:, None] + 0 * bins[None, :] < num_blocks
        count = tl.load(place, mask=inside, other=0)
        tl.store(place, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    tl.store(offsets + bins, _starts(total), mask=bins <= num_experts)


@triton.jit
def _place_kernel(
    experts, counts, offsets, rows, num_entries, first, num_experts, stride,
    CHOICES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block counts on from those before it, at counters that no other block touches."""
    block = tl.program_id(0)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    local, mine = _local_expert(experts, entry, num_entries, first, num_experts, stride, CHOICES)
    row = tl.load(offsets + local, mask=mine, other=0)
    row += tl.atomic_add(counts + block * BINS + local, 1, mask=mine, sem="relaxed", scope="cta")
    tl.store(rows + entry, tl.where(mine, row, -1), mask=entry < num_entries)


@triton.jit
def _sort_kernel(
    experts, counts, offsets, rows, num_entries, first, num_experts, stride,
    CHOICES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All in one program: barriers order the counters' uses."""
    bins = tl.arange(0, BINS)
    tl.store(counts + bins, tl.zeros((BINS,), tl.int32), mask=bins < num_experts)
    entry = tl.arange(0, BLOCK)
    local, mine = _local_expert(experts, entry, num_entries, first, num_experts, stride, CHOICES)
    tl.debug_barrier()
    rank = tl.atomic_add(counts + local, 1, mask=mine, sem="relaxed", scope="cta")
    tl.debug_barrier()
    count = tl.load(counts + bins, mask=bins < num_experts, other=0)
    tl.store(offsets + bins, _starts(count), mask=bins <= num_experts)
    tl.debug_barrier()
    start = tl.load(offsets + local, mask=mine, other=0)
    tl.store(rows + entry, tl.where(mine, start + rank, -1), mask=entry < num_entries)


def sort_by_expert(experts_TK: Tensor, first: int, num_experts: int) -> ExpertRows:
    """experts_TK int32 or int64, global expert numbers; a token's choices lie together."""
    device, num_entries, choices = experts_TK.device, experts_TK.numel(), experts_TK.shape[1]
    rows = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    bins = triton.next_power_of_2(num_experts + 1)
    if 0 < num_entries <= MOST_AT_ONCE:
        counts, offsets = torch.empty(2, num_experts + 1, dtype=torch.int32, device=device)
        block = triton.next_power_of_2(num_entries)
        _sort_kernel[(1,)](
            experts_TK, counts, offsets, rows, num_entries, first, num_experts, experts_TK.stride(0),
            CHOICES=choices, BINS=bins, BLOCK=block, num_warps=max(1, min(32, max(block, bins) // 64)),
        )  # fmt: skip
        return ExpertRows(offsets, rows)
    if not num_entries:
        return ExpertRows(torch.zeros(num_experts + 1, dtype=torch.int32, device=device), rows)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    num_blocks = triton.cdiv(num_entries, ENTRIES)
    counts = torch.empty(num_blocks, bins, dtype=torch.int32, device=device)
    where = (num_entries, first, num_experts, experts_TK.stride(0))
    _count_kernel[(num_blocks,)](experts_TK, counts, *where, CHOICES=choices, BINS=bins, BLOCK=ENTRIES)
    _offsets_kernel[(1,)](counts, offsets, num_blocks, num_experts, BINS=bins, CHUNK=min(CHUNK, max(1, 4096 // bins)))
    _place_kernel[(num_blocks,)](
        experts_TK, counts, offsets, rows, *where, CHOICES=choices, BINS=bins, BLOCK=ENTRIES, num_warps=8
    )
    return ExpertRows(offsets, rows)


@triton.jit
def _quantize_rows_kernel(
    x, x_scales, rows, weights, codes, scales, route_weight,
    stride_x, stride_x_scales, stride_weights, stride_codes, stride_scales,
    CHOICES: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, QUANTIZED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.arange(0, SLOTS)
    groups: tl.constexpr = BLOCK // 128
    column = part * BLOCK + tl.arange(0, BLOCK)
    group = part * groups + tl.arange(0, groups)
    row_of = tl.load(
        rows + token * CHOICES + slot, mask=slot < CHOICES, other=-1
    )  # all at once: stores end what may move up
    if tl.max(row_of, axis=0) >= 0:
        if QUANTIZED:
            code = tl.load(x + token * stride_x + column)
            scale = from_exponent_byte(tl.load(x_scales + token * stride_x_scales + group))
        else:
            value = tl.reshape(tl.load(x + token * stride_x + column).to(tl.float32), (groups, 128))
            scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(value), axis=1), 1e-4), 1.0 / 448.0)
            code = tl.reshape(to_e4m3(value * (1.0 / scale)[:, None], INTERPRET), (BLOCK,))
        for choice in tl.static_range(CHOICES):
            row = tl.max(tl.where(slot == choice, row_of, -1), axis=0).to(tl.int64)
            if row >= 0:
                tl.store(codes + row * stride_codes + column, code)
                tl.store(scales + group.to(tl.int64) * stride_scales + row, scale)
                if part == 0:
                    tl.store(route_weight + row, tl.load(weights + token * stride_weights + choice))


def quantize_rows(x_TD: Tensor | QuantizedTokens, weights_TK: Tensor, rows: ExpertRows) -> tuple[QuantizedRows, Tensor]:
    """Tokens [T, D], bf16, float32 or quantised, D a multiple of 128; weights float32, a token's together
    -> (e4m3 rows [R, D] of the local experts, float32 [R] routing weight of each).

    Rows that no token fills keep whatever the allocator left there."""
    (num_tokens, hidden), choices = x_TD.shape, weights_TK.shape[1]
    if hidden % GROUP:
        raise ValueError(f"hidden={hidden}: expert inputs are quantised in groups of {GROUP}")
    num_rows = num_tokens * choices + (ROW_ALIGN - 1) * (rows.offsets_E.shape[0] - 1)
    device = weights_TK.device
    empty = torch.zeros if INTERPRET else torch.empty  # the interpreter warns of what rows of nobody come to
    codes = empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=device)
    scales = empty(hidden // GROUP, scale_stride(num_rows), dtype=torch.float32, device=device)
    route_weight = empty(num_rows, dtype=torch.float32, device=device)
    if num_tokens:
        block = next(size for size in (1024, 512, 256, 128) if hidden % size == 0)
        quantized = isinstance(x_TD, QuantizedTokens)
        values, value_scales = (x_TD.codes_TD, x_TD.scales_TG) if isinstance(x_TD, QuantizedTokens) else (x_TD, x_TD)
        _quantize_rows_kernel[(num_tokens, hidden // block)](
            values, value_scales, rows.row_TK, weights_TK, codes, scales, route_weight, values.stride(0),
            value_scales.stride(0), weights_TK.stride(0), codes.stride(0), scales.stride(0), CHOICES=choices,
            SLOTS=triton.next_power_of_2(choices), BLOCK=block, QUANTIZED=quantized, INTERPRET=INTERPRET,
            num_warps=max(1, block // 512),
        )  # fmt: skip
    return QuantizedRows(codes, scales), route_weight


@triton.jit
def _combine_kernel(
    y, rows, shared, output, hidden, stride_y, stride_shared, stride_output,
    CHOICES: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):  # without branches: all rows are on their way at once
        row = tl.load(rows + token * CHOICES + choice).to(tl.int64)
        total += tl.load(y + row * stride_y + column, mask=inside & (row + 0 * column >= 0), other=0.0).to(tl.float32)
    if SHARED:
        total += tl.load(shared + token * stride_shared + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + token * stride_output + column, to_bf16(total, INTERPRET) if BF16 else total, mask=inside)


def combine_rows(
    y_RD: Tensor, rows: ExpertRows, shared_TD: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sum of each token's rows in the order of its choices, [T, D] in `dtype`, float32 or bfloat16; with the shared
    expert's output added, in that one's dtype. Rounded once."""
    (num_tokens, choices), hidden = rows.row_TK.shape, y_RD.shape[1]
    if shared_TD is not None:
        dtype = shared_TD.dtype
    output = torch.empty(num_tokens, hidden, dtype=dtype, device=y_RD.device)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(hidden))
        shared = y_RD if shared_TD is None else shared_TD
        _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
            y_RD, rows.row_TK, shared, output, hidden, y_RD.stride(0), shared.stride(0), output.stride(0),
            CHOICES=choices, SHARED=shared_TD is not None, BLOCK=block, BF16=dtype == torch.bfloat16,
            INTERPRET=INTERPRET,
        )  # fmt: skip
    return output
