"""FP8 block products on the GPU by the fastest kernel that fits (specification: kernels.fp8_gemm).

T rows, N outputs, K channels, G groups: outputs [g N / G, (g + 1) N / G) see channels [g K, (g + 1) K) of the rows.
Hopper runs kernels/cuda/fp8_gemm.cu for bf16 results of whole blocks of 128, anything else the Triton kernels. Bound by
the read of the weight for few rows, by the FP8 tensor cores for many.
"""

from __future__ import annotations

from ctypes import c_float
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.quantize import QuantizedRows
from kernels.triton_fp8_gemm import check_product, fp8_product, num_multiprocessors
from kernels.triton_quantize import quantize_activations, scale_stride
from kernels.triton_rotary import inverse_rope_quantize

BLOCK = 128
MAX_CHANNELS = 64 * BLOCK
"""K of one product in fp8_gemm.cu."""
HEAD_DIM, ROTARY = 512, 64
"""Of heads that fp8_gemm.cu finishes."""
VALUES, CODES, HEADS = 0, 1, 2
"""Results of fp8_gemm.cu."""


class Tile(NamedTuple):
    """What fp8_gemm.cu computes at once, as compiled there. It changes speed, never a bit of the result."""

    rows: int
    outputs: int
    cluster: int = 1
    """CTAs along the outputs that share the copies of their rows."""
    band: int = 8
    """Clusters down the rows that go through all outputs together, so that L2 keeps their operands."""


class HeadFinish(NamedTuple):
    """What turns products into heads."""

    angles: tuple[Tensor, Tensor]
    eps: float


_STEP_US = {
    Tile(64, 32): 0.155, Tile(64, 64): 0.20, Tile(64, 128): 0.26, Tile(128, 64): 0.25, Tile(128, 128): 0.38,
    Tile(256, 128): 0.69, Tile(128, 256, 2, 16): 0.68,
}  # fmt: skip
"""Tiles of values, and what 128 channels take when all multiprocessors work at such a tile, measured on an H200."""
TILES = tuple(_STEP_US)
HEAD_TILES = (Tile(64, 256, 2, 16), Tile(128, 256, 2, 16))
"""A cluster holds whole heads."""
MANY_ROWS = 1024
"""Rows from which sharing copies in a cluster pays."""


@lru_cache(maxsize=256)
def tile_for(num_rows: int, outputs: int, groups: int, multiprocessors: int, *, codes: bool = False) -> Tile:
    """The tile with which a product of so many rows is done soonest; `codes`: among those that can quantise."""

    def fits(tile: Tile) -> bool:
        shared = tile.cluster == 1 or num_rows > MANY_ROWS
        whole = outputs // groups % (tile.outputs * tile.cluster) == 0
        return shared and whole and (tile.outputs >= BLOCK or not codes)

    def duration(tile: Tile) -> float:
        tiles = -(-num_rows // tile.rows) * (outputs // tile.outputs)
        return -(-tiles // multiprocessors) * _STEP_US[tile]

    return min(filter(fits, _STEP_US), key=duration)


def fits_hopper(codes_NK: Tensor, groups: int) -> bool:
    """Whether this machine and fp8_gemm.cu can multiply by such a weight."""
    outputs, channels = codes_NK.shape
    if not codes_NK.is_cuda or channels % BLOCK or channels > MAX_CHANNELS or outputs % (groups * BLOCK):
        return False
    try:
        cuda_build.load("fp8_gemm")
    except cuda_build.CudaUnavailable:
        return False
    return True


def launch_hopper(
    tile: Tile,
    rows: QuantizedRows,
    codes_NK: Tensor,
    scales_nk: Tensor,
    groups: int,
    y_TN: Tensor,
    *,
    code_scale: Tensor | None = None,
    finish: HeadFinish | None = None,
) -> None:
    """y bf16 [T, N], heads with `finish`; or e4m3 with code_scale float32 [N / 128, T..].

    Raises ValueError: see check_product; RuntimeError for a tile not compiled."""
    check_product(rows, codes_NK, groups)
    outputs, channels = codes_NK.shape
    address = cuda_build.address
    result = HEADS if finish is not None else VALUES if code_scale is None else CODES
    cos, sin = (None, None) if finish is None else finish.angles
    error = cuda_build.load("fp8_gemm").fp8_gemm(
        result, *tile, address(rows.codes_RD), address(rows.scales_GR), address(codes_NK), address(scales_nk),
        address(y_TN), address(code_scale), address(cos), address(sin), c_float(0.0 if finish is None else finish.eps),
        y_TN.shape[0], outputs, channels // BLOCK, groups, rows.scales_GR.stride(0), scales_nk.stride(0),
        y_TN.stride(0), 0 if code_scale is None else code_scale.stride(0), cuda_build.stream(codes_NK.device),
    )  # fmt: skip
    cuda_build.check(error, f"fp8_gemm({tile}, result {result}, {tuple(y_TN.shape)}, {channels} channels)")


def fp8_product_gpu(
    rows: QuantizedRows, codes_NK: Tensor, scales_nk: Tensor, dtype: torch.dtype, groups: int = 1
) -> Tensor:
    """rows [T, G K]; codes uint8 [N, K]; scales uint8 E8M0 [N / 128, K / 128] -> `dtype` [T, N]."""
    num_rows, outputs = rows.codes_RD.shape[0], codes_NK.shape[0]
    if not num_rows or dtype != torch.bfloat16 or not fits_hopper(codes_NK, groups):
        return fp8_product(rows, codes_NK, scales_nk, dtype, groups)
    y = torch.empty(num_rows, outputs, dtype=dtype, device=codes_NK.device)
    tile = tile_for(num_rows, outputs, groups, num_multiprocessors(codes_NK.device))
    launch_hopper(tile, rows, codes_NK, scales_nk, groups, y)
    return y


def fp8_product_codes(rows: QuantizedRows, codes_NK: Tensor, scales_nk: Tensor, groups: int = 1) -> QuantizedRows:
    """The bf16 values of fp8_product_gpu, quantised for the next product; to the bit as in two steps."""
    num_rows, outputs = rows.codes_RD.shape[0], codes_NK.shape[0]
    if not num_rows or not fits_hopper(codes_NK, groups):
        return quantize_activations(fp8_product_gpu(rows, codes_NK, scales_nk, torch.bfloat16, groups))
    codes = torch.empty(num_rows, outputs, dtype=torch.float8_e4m3fn, device=codes_NK.device)
    scales = torch.empty(outputs // BLOCK, scale_stride(num_rows), dtype=torch.float32, device=codes_NK.device)
    tile = tile_for(num_rows, outputs, groups, num_multiprocessors(codes_NK.device), codes=True)
    launch_hopper(tile, rows, codes_NK, scales_nk, groups, codes, code_scale=scales)
    return QuantizedRows(codes, scales)


def fits_heads(codes_NK: Tensor, head_dim: int, angles: tuple[Tensor, Tensor]) -> bool:
    """Whether fp8_heads can run."""
    return head_dim == HEAD_DIM and 2 * angles[0].shape[1] == ROTARY and fits_hopper(codes_NK, 1)


def fp8_heads(
    x: Tensor | QuantizedRows,
    codes_NK: Tensor,
    scales_nk: Tensor,
    head_dim: int,
    angles: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """kernels.query_heads.query_heads, finished: bf16 [T, H, D]."""
    rows = x if isinstance(x, QuantizedRows) else quantize_activations(x)
    num_rows, outputs = rows.codes_RD.shape[0], codes_NK.shape[0]
    y = torch.empty(num_rows, outputs, dtype=torch.bfloat16, device=codes_NK.device)
    if num_rows:
        tile = HEAD_TILES[num_rows > HEAD_TILES[0].rows]
        launch_hopper(tile, rows, codes_NK, scales_nk, 1, y, finish=HeadFinish(angles, eps))
    return y.unflatten(-1, (-1, head_dim))


def fp8_gemm_gpu(x: Tensor | QuantizedRows, codes_NK: Tensor, scales_nk: Tensor) -> Tensor:
    """kernels.fp8_gemm.fp8_gemm."""
    if isinstance(x, QuantizedRows):
        return fp8_product_gpu(x, codes_NK, scales_nk, torch.bfloat16)
    return fp8_product_gpu(quantize_activations(x), codes_NK, scales_nk, x.dtype)


def grouped_output_fp8_gpu(
    x_THD: Tensor | QuantizedRows, angles: tuple[Tensor, Tensor], codes_NK: Tensor, scales_nk: Tensor
) -> Tensor | QuantizedRows:
    """kernels.grouped_output.grouped_output_fp8: bf16 activations stay quantised."""
    rows = x_THD if isinstance(x_THD, QuantizedRows) else inverse_rope_quantize(x_THD, *angles)
    groups = rows.codes_RD.shape[1] // codes_NK.shape[1]
    if isinstance(x_THD, QuantizedRows) or x_THD.dtype == torch.bfloat16:
        return fp8_product_codes(rows, codes_NK, scales_nk, groups)
    return fp8_product_gpu(rows, codes_NK, scales_nk, x_THD.dtype, groups)
