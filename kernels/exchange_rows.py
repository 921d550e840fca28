"""A token and its routing as one row of bytes, for the exchange between ranks that share the experts, and the way back.

T tokens of this rank, U rows of all ranks, D hidden, K experts a token. A row: float32 weights [K], int32 experts [K],
then the token. Quantised: e4m3 codes [D] and an E8M0 byte per 128 channels; the experts quantise their inputs so anyway
and doing it twice changes nothing (kernels.quantize), so it halves the bytes for free, and on a GPU the experts read
the rows where they arrived. Else: D values as they are. Each part begins at a multiple of 16 bytes. Back come the sums
of every rank's experts. Bound by memory; at decode, by launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.quantize import dequantize_fp8, quantize_fp8

GROUP = 128
_ALIGN = 16


class QuantizedTokens(NamedTuple):
    """Tokens as e4m3 with an E8M0 byte per 128 channels; rows may lie apart."""

    codes_TD: Tensor
    """float8_e4m3fn [T, D]."""
    scales_TG: Tensor
    """uint8 [T, ceil(D / 128)]."""
    dtype: torch.dtype
    """Of the tokens before they were quantised."""

    @property
    def shape(self) -> torch.Size:
        return self.codes_TD.shape

    def values(self) -> Tensor:
        """[T, D] in `dtype`."""
        return dequantize_fp8(self.codes_TD.view(torch.uint8), self.scales_TG, GROUP).to(self.dtype)


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


def pack_rows(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, layout: RowFormat, num_rows: int, nowhere: int
) -> Tensor:
    """-> uint8 [num_rows, row_bytes]; rows beyond the T tokens name expert `nowhere`, which no rank holds."""
    if _fits_gpu(x_TD, layout):
        from kernels.triton_exchange_rows import pack_rows_gpu

        return pack_rows_gpu(x_TD, experts_TK, weights_TK, layout, num_rows, nowhere)
    return pack_rows_ref(x_TD, experts_TK, weights_TK, layout, num_rows, nowhere)


def unpack_rows(rows_UW: Tensor, layout: RowFormat) -> tuple[Tensor | QuantizedTokens, Tensor, Tensor]:
    """-> (tokens [U, D], experts int32 [U, K], weights float32 [U, K]), all where they lie in the rows."""
    topk, hidden, begin = layout.topk, layout.hidden, layout.token_offset
    weights = rows_UW[:, : 4 * topk].view(torch.float32)
    experts = rows_UW[:, 4 * topk : 8 * topk].view(torch.int32)
    if layout.quantised:
        scales = rows_UW[:, layout.scale_offset : layout.scale_offset + -(-hidden // GROUP)]
        codes = rows_UW[:, begin : begin + hidden].view(torch.float8_e4m3fn)
        return QuantizedTokens(codes, scales, layout.dtype), experts, weights
    return rows_UW[:, begin : begin + hidden * layout.dtype.itemsize].view(layout.dtype), experts, weights


def add_sums_ref(sums_SMD: Tensor, shared_TD: Tensor, output_TD: Tensor) -> None:
    total = sums_SMD[0, : shared_TD.shape[0]].float()
    for sums_MD in sums_SMD[1:]:
        total = total + sums_MD[: shared_TD.shape[0]]
    output_TD.copy_(total + shared_TD)


def add_sums(sums_SMD: Tensor, shared_TD: Tensor, output_TD: Tensor) -> None:
    """output [T, D] becomes the sum of S ranks' experts, float32 or bf16 [S, M, D] with M >= T, and the shared expert's
    output [T, D]: added in float32 in this order and rounded once."""
    if use_triton(sums_SMD):
        from kernels.triton_exchange_rows import add_sums_gpu

        add_sums_gpu(sums_SMD, shared_TD, output_TD)
    else:
        add_sums_ref(sums_SMD, shared_TD, output_TD)


def _fits_gpu(tensor: Tensor, layout: RowFormat) -> bool:
    return use_triton(tensor) and layout.quantised and layout.hidden % GROUP == 0
