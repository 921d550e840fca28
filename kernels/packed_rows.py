"""Rows of vectors inside pages or slots, in the format they travel in: write, read.

A pool is [P, R] records: P pages (or slots) with R rows each, seen through strides (one layer's region of a block-major
page). Formats, for rows of `width` channels of which the last `rope_dim` are rotary:

    bf16, f32   plain rows
    kv_fp8      data: e4m3 of the plain channels, then bf16 of the rotary ones; scales: E8M0, one per 64 plain channels
    key_mxfp4   data: e2m1 nibbles of all channels; scales: an E8M0 byte per 32 channels
    key_fp8     data: e4m3 of all channels; scales: one float32 power of two per row

Writing quantises; reading dequantises to `dtype`. Callers never use rows that no write has reached, so those may hold
any bytes. Out-of-range indices are the caller's bug. Bound by memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.hadamard import hadamard
from kernels.quantize import (
    decode_e4m3,
    decode_e8m0,
    dequantize_fp4,
    dequantize_fp8,
    quantize_fp4,
    quantize_fp8,
    simulate_fp4,
    simulate_fp8,
)

PoolFormat = Literal["bf16", "f32", "kv_fp8", "key_mxfp4", "key_fp8"]
KV_BLOCK = 64
KEY_BLOCK = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """Strided views of one layer's rows over a whole pool."""

    format: PoolFormat
    width: int
    rope_dim: int
    """Rotary channels of a KV row; 0 for index keys, which are quantised whole."""
    data: Tensor
    """[P, R, record]: uint8 for packed formats, else bfloat16 or float32 with record = width."""
    scales: Tensor | None = None
    """[P, R, s]: uint8 E8M0 (kv_fp8, key_mxfp4) or float32 (key_fp8)."""

    @property
    def rows(self) -> int:
        """Rows per page or slot."""
        return int(self.data.shape[1])

    def like(self, num_rows: int) -> PackedRows:
        """A new contiguous pool [1, num_rows] of the same format, uninitialised."""

        def empty(view: Tensor | None) -> Tensor | None:
            return None if view is None else view.new_empty(1, num_rows, view.shape[2])

        data = empty(self.data)
        assert data is not None
        return PackedRows(
            format=self.format, width=self.width, rope_dim=self.rope_dim, data=data, scales=empty(self.scales)
        )


def write_rows_ref(pool: PackedRows, page: Tensor, row: Tensor, values: Tensor) -> None:
    """values [n, width] into pool[page[i], row[i]], quantised to the pool's format. Targets are distinct."""
    if pool.format in ("bf16", "f32"):
        pool.data[page, row] = values.to(pool.data.dtype)
        return
    assert pool.scales is not None
    if pool.format == "kv_fp8":
        plain = pool.width - pool.rope_dim
        codes, scales = quantize_fp8(values[:, :plain], KV_BLOCK)
        rotary = values[:, plain:].to(torch.bfloat16).view(torch.uint8)
        pool.data[page, row] = torch.cat((codes, rotary), -1)
        pad = pool.scales.shape[2] - scales.shape[1]
        pool.scales[page, row] = torch.nn.functional.pad(scales, (0, pad))
    elif pool.format == "key_mxfp4":
        packed, scales = quantize_fp4(values, KEY_BLOCK)
        pool.data[page, row] = packed
        pool.scales[page, row] = scales
    else:
        codes, scales = quantize_fp8(values, pool.width)
        pool.data[page, row] = codes
        pool.scales[page, row] = decode_e8m0(scales)


def read_rows_ref(pool: PackedRows, page: Tensor, row: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows pool[page[i], row[i]] -> [n, width] in `dtype`."""
    data = pool.data[page, row]
    if pool.scales is None:
        return data.to(dtype)
    scales = pool.scales[page, row]
    if pool.format == "kv_fp8":
        plain = pool.width - pool.rope_dim
        values = dequantize_fp8(data[:, :plain], scales[:, : plain // KV_BLOCK], KV_BLOCK)
        rotary = data[:, plain:].contiguous().view(torch.bfloat16)
        return torch.cat((values.to(dtype), rotary.to(dtype)), -1)
    if pool.format == "key_mxfp4":
        return dequantize_fp4(data, scales, KEY_BLOCK).to(dtype)
    return (decode_e4m3(data) * scales).to(dtype)


def simulate_row_ref(pool: PackedRows, values: Tensor) -> Tensor:
    """The released program's rounding of KV rows (FP8 on the plain channels) or of rotated index keys and queries
    (FP4, or FP8 where the keys are kept so), in the dtype of `values` [..., width]."""
    if pool.rope_dim:
        plain = pool.width - pool.rope_dim
        return torch.cat((simulate_fp8(values[..., :plain], KV_BLOCK), values[..., plain:]), -1)
    if pool.format == "key_fp8":
        return simulate_fp8(values, pool.width)
    return simulate_fp4(values, KEY_BLOCK)


def store_rows(pool: PackedRows, page: Tensor, row: Tensor, values: Tensor, *, simulate: bool) -> None:
    """Writes KV rows or index keys. With `simulate` index keys are Hadamard-rotated first, and plain formats hold the
    values that the released program's quantisation leaves."""
    if use_triton(values):
        from kernels.triton_rows import fits, store_rows_triton

        if fits(pool):
            store_rows_triton(pool, page, row, values, simulate=simulate)
            return
    if simulate and not pool.rope_dim:
        values = hadamard(values)
    if simulate and pool.scales is None:
        values = simulate_row(pool, values)
    write_rows(pool, page, row, values)


def simulate_row(pool: PackedRows, values: Tensor) -> Tensor:
    return simulate_row_ref(pool, values)


def write_rows(pool: PackedRows, page: Tensor, row: Tensor, values: Tensor) -> None:
    write_rows_ref(pool, page, row, values)


def read_rows(pool: PackedRows, page: Tensor, row: Tensor, dtype: torch.dtype) -> Tensor:
    return read_rows_ref(pool, page, row, dtype)


def copy_rows(
    source: PackedRows, source_page: Tensor, source_row: Tensor, target: PackedRows, page: Tensor, row: Tensor
) -> None:
    """Copies records byte for byte between pools of one format."""
    target.data[page, row] = source.data[source_page, source_row]
    if target.scales is not None and source.scales is not None:
        target.scales[page, row] = source.scales[source_page, source_row]
