"""A token and its routing as one row of bytes, for the exchange between ranks that share the experts, and back.

T tokens of this rank, U rows of all ranks, D hidden, K experts a token. A row: float32 weights [K], int32 experts [K],
then the token. Quantised: e4m3 codes [D] and an E8M0 byte per 128 channels; the experts quantise their inputs so anyway
and doing it twice changes nothing (kernels.quantize), so it halves the bytes for free. Else: D values as they are. Each
part begins at a multiple of 16 bytes. Bound by memory; at decode, by launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.quantize import dequantize_fp8, quantize_fp8

GROUP = 128
_ALIGN = 16


class RowFormat(NamedTuple):
    """What a row holds."""

    hidden: int
    topk: int
    dtype: torch.dtype
    """Of the tokens, before and after."""
    quantised: bool

    @property
    def token_offset(self) -> int:
        return _aligned(8 * self.topk)

    @property
    def scale_offset(self) -> int:
        """Of the scales behind the codes."""
        return self.token_offset + _aligned(self.hidden)

    @property
    def row_bytes(self) -> int:
        if self.quantised:
            return self.scale_offset + _aligned(-(-self.hidden // GROUP))
        return self.token_offset + _aligned(self.hidden * self.dtype.itemsize)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def pack_rows_ref(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, layout: RowFormat, num_rows: int, nowhere: int
) -> Tensor:
    num_tokens, topk = experts_TK.shape
    rows = torch.zeros(num_rows, layout.row_bytes, dtype=torch.uint8, device=x_TD.device)
    numbers = rows[:, 4 * topk : 8 * topk].view(torch.int32)
    numbers[num_tokens:] = nowhere
    mine = rows[:num_tokens]
    mine[:, : 4 * topk].view(torch.float32).copy_(weights_TK)
    numbers[:num_tokens] = experts_TK
    token = mine[:, layout.token_offset :]
    if layout.quantised:
        codes, scales = quantize_fp8(x_TD, GROUP)
        token[:, : layout.hidden] = codes
        mine[:, layout.scale_offset : layout.scale_offset + scales.shape[1]] = scales
    else:
        token[:, : layout.hidden * layout.dtype.itemsize].view(layout.dtype).copy_(x_TD)
    return rows


def unpack_rows_ref(rows_UW: Tensor, layout: RowFormat) -> tuple[Tensor, Tensor, Tensor]:
    topk, hidden, begin = layout.topk, layout.hidden, layout.token_offset
    weights = rows_UW[:, : 4 * topk].view(torch.float32).contiguous()
    experts = rows_UW[:, 4 * topk : 8 * topk].view(torch.int32).long()
    if layout.quantised:
        scales = rows_UW[:, layout.scale_offset : layout.scale_offset + -(-hidden // GROUP)]
        x = dequantize_fp8(rows_UW[:, begin : begin + hidden], scales, GROUP).to(layout.dtype)
    else:
        x = rows_UW[:, begin : begin + hidden * layout.dtype.itemsize].view(layout.dtype).contiguous()
    return x, experts, weights


def pack_rows(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, layout: RowFormat, num_rows: int, nowhere: int
) -> Tensor:
    """-> uint8 [num_rows, row_bytes]; rows beyond the T tokens name expert `nowhere`, which no rank holds."""
    if _fits_gpu(x_TD, layout):
        from kernels.triton_exchange_rows import pack_rows_gpu

        return pack_rows_gpu(x_TD, experts_TK, weights_TK, layout, num_rows, nowhere)
    return pack_rows_ref(x_TD, experts_TK, weights_TK, layout, num_rows, nowhere)


def unpack_rows(rows_UW: Tensor, layout: RowFormat) -> tuple[Tensor, Tensor, Tensor]:
    """-> (tokens [U, D], experts int64 [U, K], weights float32 [U, K])."""
    if _fits_gpu(rows_UW, layout):
        from kernels.triton_exchange_rows import unpack_rows_gpu

        return unpack_rows_gpu(rows_UW, layout)
    return unpack_rows_ref(rows_UW, layout)


def _fits_gpu(tensor: Tensor, layout: RowFormat) -> bool:
    return use_triton(tensor) and layout.quantised and layout.hidden % GROUP == 0
