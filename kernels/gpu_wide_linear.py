"""Wide products on Hopper: kernels/cuda/wide_gemm.cu behind kernels.wide_linear.

A library picks its algorithm, and with it the order of a sum, by the number of rows. Here the weight's shape alone
decides into how many parts the channels are cut, so a row's sums do not depend on the rows beside it.
"""

from __future__ import annotations

from ctypes import c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cuda_build

_OUTPUTS, _DEPTH = 64, 64
"""Of a warpgroup; channels of a stage."""
_PARTS = ((8, 8), (32, 4), (128, 2))
"""(most tiles of 64 outputs, parts of the channels); beyond, one. Part of the numerics, so the same on every GPU."""


class Tile(NamedTuple):
    """What a cluster computes, as compiled in wide_gemm.cu; changes speed only."""

    tokens: int
    groups: int
    """Of 64 outputs."""
    in_turn: bool = False
    """Whether a CTA sums all parts of the channels one after the other; else each has a CTA of the cluster."""


def fits(x_TK: Tensor, weight_NK: Tensor) -> bool:
    """Whether this machine and the kernel know such operands."""
    if not x_TK.is_cuda or x_TK.dtype != torch.bfloat16 or weight_NK.dtype != torch.bfloat16:
        return False
    aligned = x_TK.stride(0) % 8 == 0 and weight_NK.stride(0) % 8 == 0 and x_TK.stride(1) == weight_NK.stride(1) == 1
    if not aligned or x_TK.data_ptr() % 16 or weight_NK.data_ptr() % 16 or x_TK.shape[1] % _DEPTH:
        return False
    try:
        cuda_build.load("wide_gemm")
    except cuda_build.CudaUnavailable:
        return False
    return bool(x_TK.shape[0])


def parts_of(outputs: int, channels: int) -> int:
    """How many parts the channels are summed in."""
    tiles = -(-outputs // _OUTPUTS)
    parts = next((parts for most, parts in _PARTS if tiles <= most), 1)
    while channels % (_DEPTH * parts):
        parts //= 2
    return parts


def tile_for(num_rows: int, outputs: int) -> Tile:
    """The tile that was fastest for such a product: docs/kernels.md."""
    if outputs <= 2048 and num_rows >= (1024 if outputs > 512 else 4096):
        return Tile(128, 2, in_turn=True)
    if num_rows <= 64:
        return Tile(16 if num_rows <= 16 else 64, 1)
    if outputs <= 512 and num_rows <= 512:
        return Tile(64 if num_rows <= 128 else 128 if num_rows <= 256 else 256, 1)
    if outputs <= 8192:
        return Tile(128, 1) if num_rows <= 128 else Tile(128, 2) if num_rows <= 256 else Tile(256, 2)
    return Tile(128 if num_rows <= 128 else 256, 2)


def wide_linear_gpu(x_TK: Tensor, weight_NK: Tensor, *, tile: Tile | None = None) -> Tensor:
    """x bf16 [T, K], weight bf16 [N, K] that fit -> float32 [T, N]."""
    (num_rows, channels), outputs = x_TK.shape, weight_NK.shape[0]
    y = torch.empty(num_rows, outputs, dtype=torch.float32, device=x_TK.device)
    at = cuda_build.address
    error = cuda_build.load("wide_gemm").wide_gemm(
        *(tile or tile_for(num_rows, outputs)), parts_of(outputs, channels), at(x_TK), c_int64(x_TK.stride(0)),
        at(weight_NK), c_int64(weight_NK.stride(0)), at(y), num_rows, outputs, channels,
        cuda_build.stream(x_TK.device),
    )  # fmt: skip
    cuda_build.check(error, f"wide_gemm({num_rows} x {outputs} x {channels})")
    return y
