"""Rows of the expert exchange, one launch each way. Specification and layout: kernels.exchange_rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.exchange_rows import GROUP, RowFormat
from kernels.triton_common import INTERPRET, exponent_byte, from_exponent_byte, power_of_two_scale, to_bf16, to_e4m3


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
def _unpack_kernel(
    rows_f32, rows_i32, rows_u8, rows_e4m3, x, experts, weights, hidden, row_bytes,
    TOPK: tl.constexpr, CHOICES: tl.constexpr, TOKEN: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    groups: tl.constexpr = BLOCK // 128
    if part == 0:
        choice = tl.arange(0, CHOICES)
        held = choice < TOPK
        words = row * (row_bytes // 4) + choice
        tl.store(weights + row * TOPK + choice, tl.load(rows_f32 + words, mask=held), mask=held)
        tl.store(experts + row * TOPK + choice, tl.load(rows_i32 + words + TOPK, mask=held).to(tl.int64), mask=held)
    column = part * BLOCK + tl.arange(0, BLOCK)
    group = part * groups + tl.arange(0, groups)
    scale = from_exponent_byte(tl.load(rows_u8 + row * row_bytes + SCALES + group))
    code = tl.load(rows_e4m3 + row * row_bytes + TOKEN + column).to(tl.float32)
    value = tl.reshape(tl.reshape(code, (groups, 128)) * scale[:, None], (BLOCK,))
    if BF16:
        tl.store(x + row * hidden + column, to_bf16(value, INTERPRET))
    else:
        tl.store(x + row * hidden + column, value)


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


def unpack_rows_gpu(rows_UW: Tensor, layout: RowFormat) -> tuple[Tensor, Tensor, Tensor]:
    """As unpack_rows, for rows of `pack_rows_gpu`; contiguous."""
    num_rows, device = rows_UW.shape[0], rows_UW.device
    x = torch.empty(num_rows, layout.hidden, dtype=layout.dtype, device=device)
    experts = torch.empty(num_rows, layout.topk, dtype=torch.int64, device=device)
    weights = torch.empty(num_rows, layout.topk, dtype=torch.float32, device=device)
    if num_rows:
        block = _block(layout.hidden)
        assert layout.hidden % GROUP == 0
        _unpack_kernel[(num_rows, layout.hidden // block)](
            *_views(rows_UW), x, experts, weights, layout.hidden, layout.row_bytes, TOPK=layout.topk,
            CHOICES=triton.next_power_of_2(layout.topk), TOKEN=layout.token_offset, SCALES=layout.scale_offset,
            BLOCK=block, BF16=layout.dtype == torch.bfloat16, INTERPRET=INTERPRET,
        )  # fmt: skip
    return x, experts, weights
