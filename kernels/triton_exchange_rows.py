"""Rows of the expert exchange, one launch each way. Specification and layout: kernels.exchange_rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.exchange_rows import RowFormat
from kernels.triton_common import INTERPRET, exponent_byte, power_of_two_scale, to_bf16, to_e4m3


@triton.jit
def _pack_kernel(
    x, experts, weights, rows_f32, rows_i32, rows_u8, rows_e4m3, num_tokens, nowhere, stride_x, row_bytes,
    TOPK: tl.constexpr, CHOICES: tl.constexpr, TOKEN: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    groups: tl.constexpr = BLOCK // 128
    # Masks compare blocks: the interpreter cannot spread a truth value.
    if part == 0:
        choice = tl.arange(0, CHOICES)
        held = (choice < TOPK) & (row + 0 * choice < num_tokens)
        weight = tl.load(weights + row * TOPK + choice, mask=held, other=0.0)
        expert = tl.load(experts + row * TOPK + choice, mask=held, other=0).to(tl.int32)
        expert = tl.where(held, expert, nowhere)
        words = row * (row_bytes // 4) + choice
        tl.store(rows_f32 + words, weight, mask=choice < TOPK)
        tl.store(rows_i32 + words + TOPK, expert, mask=choice < TOPK)
    column = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * stride_x + column, mask=row + 0 * column < num_tokens, other=0.0).to(tl.float32)
    value = tl.reshape(value, (groups, 128))
    scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(value), axis=1), 1e-4), 1.0 / 448.0)
    code = tl.reshape(to_e4m3(value * (1.0 / scale)[:, None], INTERPRET), (BLOCK,))
    tl.store(rows_e4m3 + row * row_bytes + TOKEN + column, code)
    group = part * groups + tl.arange(0, groups)
    tl.store(rows_u8 + row * row_bytes + SCALES + group, exponent_byte(scale))


@triton.jit
def _add_sums_kernel(
    sums, shared, output, hidden, stride_rank, stride_row, stride_shared, stride_output,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(RANKS):
        place = sums + rank * stride_rank + row * stride_row + column
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(shared + row * stride_shared + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * stride_output + column, to_bf16(total, INTERPRET) if BF16 else total, mask=inside)


def _views(rows_UW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        rows_UW.view(torch.float32),
        rows_UW.view(torch.int32),
        rows_UW,
        rows_UW.view(torch.float8_e4m3fn),
    )


def _block(hidden: int) -> int:
    return next(size for size in (1024, 512, 256, 128) if hidden % size == 0)


def pack_rows_gpu(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, layout: RowFormat, num_rows: int, nowhere: int
) -> Tensor:
    """As pack_rows, for quantised rows of whole groups of 128 channels. The bytes between the parts are not written."""
    num_tokens, topk = experts_TK.shape
    rows = torch.empty(num_rows, layout.row_bytes, dtype=torch.uint8, device=x_TD.device)
    if num_rows:
        block = _block(layout.hidden)
        _pack_kernel[(num_rows, layout.hidden // block)](
            x_TD, experts_TK.contiguous(), weights_TK.contiguous(), *_views(rows), num_tokens, nowhere,
            x_TD.stride(0), layout.row_bytes, TOPK=topk, CHOICES=triton.next_power_of_2(topk),
            TOKEN=layout.token_offset, SCALES=layout.scale_offset, BLOCK=block, INTERPRET=INTERPRET,
        )  # fmt: skip
    return rows


def add_sums_gpu(sums_SMD: Tensor, shared_TD: Tensor, output_TD: Tensor) -> None:
    """As add_sums; channels contiguous."""
    num_tokens, hidden = shared_TD.shape
    if num_tokens:
        block = min(1024, triton.next_power_of_2(hidden))
        _add_sums_kernel[(num_tokens, triton.cdiv(hidden, block))](
            sums_SMD, shared_TD, output_TD, hidden, sums_SMD.stride(0), sums_SMD.stride(1), shared_TD.stride(0),
            output_TD.stride(0), RANKS=sums_SMD.shape[0], BLOCK=block, BF16=output_TD.dtype == torch.bfloat16,
            INTERPRET=INTERPRET,
        )  # fmt: skip
