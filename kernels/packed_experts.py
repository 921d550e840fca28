"""MXFP4 experts in the order in which kernels/cuda/experts_few.cu and experts_many.cu consume them.

E experts, M weight rows (a multiple of 256), K input channels (a multiple of 128). A tile is 256 rows, a stage of a
tile 128 channels: four units of 64 rows, each 4096 bytes of codes in the register order of wgmma's e4m3 operand
(m64k32), then four times 256 bytes of shifts, one per row and 32-group. Re-ordered, not re-quantised: codes become e4m3
values e2m1 * 2^(6 - shift), shift = row exponent - group exponent, and the row's scale is 2^(row exponent - 6).

Exact while every group of a row is within 2^14 of the row's largest; pack_experts refuses otherwise (no trained
checkpoint is near that). Source of the register order: PTX ISA, wgmma fragments for .e4m3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.moe import ExpertWeights

TILE_ROWS = 256
UNIT_ROWS = 64
STAGE_K = 128
GROUP = 32
MIXED_ROWS = 8
"""Rows apart in wgmma's accumulators that one thread holds both of."""
MAX_SHIFT = 14
UNIT_BYTES = UNIT_ROWS * STAGE_K // 2
UNIT_SHIFTS = UNIT_ROWS * STAGE_K // GROUP
STAGE_BYTES = TILE_ROWS // UNIT_ROWS * (UNIT_BYTES + UNIT_SHIFTS)


class PackedExperts(NamedTuple):
    """One matrix of all local experts."""

    data: Tensor
    """uint8 [E, M / 256, K / 128, STAGE_BYTES]."""
    row_scale: Tensor
    """float32 [E, M], in packed row order."""


class PackedBank(NamedTuple):
    """Local experts [first, first + E): gate and up rows in `gate_up_order`, down rows in their own."""

    first: int
    up: PackedExperts
    down: PackedExperts


def fits_packing(rows: int, channels: int) -> bool:
    """Whether matrices of this shape can be packed."""
    return rows % TILE_ROWS == 0 and channels % STAGE_K == 0


def empty_bank(first: int, experts: int, width: int, hidden: int, device: torch.device) -> PackedBank:
    """Uninitialised memory for experts of `width`, to be filled matrix by matrix."""

    def empty(rows: int, channels: int) -> PackedExperts:
        shape = (experts, rows // TILE_ROWS, channels // STAGE_K, STAGE_BYTES)
        data = torch.empty(shape, dtype=torch.uint8, device=device)
        return PackedExperts(data, torch.empty(experts, rows, dtype=torch.float32, device=device))

    return PackedBank(first, empty(2 * width, hidden), empty(hidden, width))


def gate_up_order(width: int, device: torch.device | None = None) -> Tensor:
    """Packed row order of stacked gate and up rows [2 * width]: 8 gate rows, then the up rows of the same columns."""
    gate = torch.arange(width, device=device).unflatten(0, (-1, MIXED_ROWS))
    return torch.stack((gate, gate + width), 1).flatten()


def _words(codes: Tensor) -> Tensor:
    """int64 codes [..., 2, 4] (two runs of four channels) -> int64 words: table indices in the low three bits of each
    nibble, signs of the first run in bits 8 j + 7, of the second in bits 8 j + 3."""
    place = torch.arange(4, device=codes.device)
    index, sign = codes & 7, codes >> 3
    first = (index[..., 0, :] << (4 * place)) | (sign[..., 0, :] << (8 * place + 7))
    second = (index[..., 1, :] << (4 * place + 16)) | (sign[..., 1, :] << (8 * place + 3))
    return (first | second).sum(-1)


def pack_matrix(codes_MK: Tensor, scales_MG: Tensor) -> tuple[Tensor, Tensor]:
    """One expert's rows in packed order: codes uint8 [M, K / 2] (even channel low), scales E8M0 uint8 [M, K / 32]
    -> (data uint8 [M / 256, K / 128, STAGE_BYTES], row_scale float32 [M]). Raises ValueError where that is inexact."""
    rows, channels = codes_MK.shape[0], 2 * codes_MK.shape[1]
    if rows % TILE_ROWS or channels % STAGE_K:
        raise ValueError(
            f"packed experts need rows % {TILE_ROWS} == 0 and channels % {STAGE_K} == 0, not {rows} x {channels}"
        )
    codes = torch.stack((codes_MK & 15, codes_MK >> 4), -1).flatten(1).long()
    used = codes.unflatten(1, (-1, GROUP)).bitwise_and(7).amax(-1) > 0
    exponent = scales_MG.int()
    top = exponent.where(used, 0).amax(-1, keepdim=True)
    shift = (top - exponent).where(used, 0)
    if int(shift.max()) > MAX_SHIFT:
        raise ValueError(f"an expert row spans 2^{int(shift.max())} between its group scales, more than 2^{MAX_SHIFT}")
    # [unit, warp 4, r 2, g 8, stage, h 2, i 2, run 2, lane 4, j 4] -> [unit, stage, h, warp, g, lane, i, r, run, j]
    view = codes.view(-1, 4, 2, 8, channels // STAGE_K, 2, 2, 2, 4, 4).permute(0, 4, 5, 1, 3, 8, 6, 2, 7, 9)
    words = _words(view)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    stages = channels // STAGE_K
    units = words.reshape(-1, stages, UNIT_BYTES // 4).view(torch.uint8)
    shifts = (8 * shift).to(torch.uint8).view(-1, UNIT_ROWS, stages, STAGE_K // GROUP).transpose(1, 2).flatten(2)

    def tiles(unit_bytes: Tensor) -> Tensor:
        return unit_bytes.unflatten(0, (-1, TILE_ROWS // UNIT_ROWS)).transpose(1, 2).flatten(2)

    row_scale = torch.ldexp(torch.ones_like(top, dtype=torch.float64), top - 133).float()[:, 0]
    return torch.cat((tiles(units), tiles(shifts)), -1), row_scale


def pack_experts(codes_EMK: Tensor, scales_EMG: Tensor, order_M: Tensor | None = None) -> PackedExperts:
    """All experts, one after the other: packing needs 16 times an expert's memory. `order_M`: packed row order."""
    experts, rows, half = codes_EMK.shape
    data = codes_EMK.new_empty(experts, rows // TILE_ROWS, 2 * half // STAGE_K, STAGE_BYTES)
    row_scale = codes_EMK.new_empty(experts, rows, dtype=torch.float32)
    for expert in range(experts):
        codes, scales = codes_EMK[expert], scales_EMG[expert]
        if order_M is not None:
            codes, scales = codes[order_M], scales[order_M]
        data[expert], row_scale[expert] = pack_matrix(codes, scales)
    return PackedExperts(data, row_scale)


def pack_bank(weights: ExpertWeights) -> PackedBank:
    """Re-orders FP4 experts. Raises ValueError where packing would not be exact."""
    if weights.w13_scale is None or weights.w2_scale is None:
        raise ValueError("only FP4 experts can be packed")
    order = gate_up_order(weights.w13.shape[1] // 2, weights.w13.device)
    return PackedBank(
        weights.first, pack_experts(weights.w13, weights.w13_scale, order), pack_experts(weights.w2, weights.w2_scale)
    )


def fill_random(packed: PackedExperts, generators: Iterable[torch.Generator]) -> None:
    """Random weights of about unit gain, each expert's from its own of `generators`. Every pattern of code bytes is
    valid, so they are drawn as they will lie."""
    split = TILE_ROWS // UNIT_ROWS * UNIT_BYTES
    for data, generator in zip(packed.data, generators, strict=True):
        data.random_(0, 256, generator=generator)
        data[..., split:].random_(0, 3, generator=generator).mul_(8)
    channels = packed.data.shape[2] * STAGE_K
    # 124: root mean square of e2m1 * 2^(6 - shift) over all codes and the three shifts.
    packed.row_scale.fill_(2.0 ** round(-math.log2(124 * math.sqrt(channels))))


def unpack_values(packed: PackedExperts) -> Tensor:
    """float32 [E, M, K] in packed row order, by the decoding rule of the CUDA kernel: specifies the layout."""
    experts, tiles, stages, _ = packed.data.shape
    split = TILE_ROWS // UNIT_ROWS * UNIT_BYTES
    words = packed.data[..., :split].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    place = torch.arange(4, device=words.device)
    first = ((words[..., None] >> (4 * place)) & 7) | (((words[..., None] >> (8 * place + 7)) & 1) << 3)
    second = ((words[..., None] >> (4 * place + 16)) & 7) | (((words[..., None] >> (8 * place + 3)) & 1) << 3)
    # [E, tile, stage, unit, h, warp, g, lane, i, r, run, j] -> [E, tile, unit, warp, r, g, stage, h, i, run, lane, j]
    codes = torch.stack((first, second), -2).view(experts, tiles, stages, 4, 2, 4, 8, 4, 2, 2, 2, 4)
    codes = codes.permute(0, 1, 3, 5, 9, 6, 2, 4, 8, 10, 7, 11).reshape(experts, tiles * TILE_ROWS, stages * STAGE_K)
    shifts = (
        packed.data[..., split:].view(experts, tiles, stages, 4, UNIT_ROWS, STAGE_K // GROUP).permute(0, 1, 3, 4, 2, 5)
    )
    shifts = (shifts.reshape(experts, tiles * TILE_ROWS, -1) // 8).repeat_interleave(GROUP, -1)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)[codes & 7]
    e4m3 = torch.ldexp(magnitudes, 6 - shifts.int()).to(torch.float8_e4m3fn).float()
    return torch.where(codes >= 8, -e4m3, e4m3) * packed.row_scale[..., None]
