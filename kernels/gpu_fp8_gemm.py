"""FP8 block products on the GPU by the fastest kernel that fits (specification: kernels.fp8_gemm).

T rows, N outputs, K channels, G groups: outputs [g N / G, (g + 1) N / G) see channels [g K, (g + 1) K) of the rows.
Hopper runs kernels/cuda/fp8_gemm.cu for bf16 results of whole blocks of 128, anything else the Triton kernels. Bound by
the read of the weight for few rows, by the FP8 tensor cores for many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.quantize import QuantizedRows
from kernels.triton_fp8_gemm import fp8_product
from kernels.triton_quantize import quantize_activations, scale_stride
from kernels.triton_rotary import inverse_rope_quantize

BLOCK = 128
MAX_CHANNELS = 64 * BLOCK
"""K of one product in fp8_gemm.cu."""


class Tile(NamedTuple):
    """What fp8_gemm.cu computes at once, as compiled there. It changes speed, never a bit of the result."""

    rows: int
    outputs: int
    cluster_rows: int = 1
    """CTAs down the rows that share their weights."""
    cluster_outputs: int = 1
    """CTAs along the outputs that share their rows."""
    band: int = 8
    """Clusters down the rows that go through all outputs together, so that L2 keeps their operands."""


FEWEST_CODES = 129
"""Rows from which quantising in the product pays: fewer leave multiprocessors idle with tiles of 128 outputs."""


def tile_for(num_rows: int, group_outputs: int, channels: int) -> Tile:
    """The tile that was fastest for such a product: docs/kernels.md has the figures."""
    raise NotImplementedError


def code_tile_for(num_rows: int) -> Tile:
    """The same among tiles whose results can be quantised."""
    raise NotImplementedError


def fits_hopper(codes_NK: Tensor, groups: int) -> bool:
    """Whether this machine and fp8_gemm.cu can multiply by such a weight."""
    return False  # until a train has shown it right
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
    y_scale_GT: Tensor | None = None,
) -> None:
    """y bf16 [T, N], or e4m3 with y_scale float32 [N / 128, T..]. Raises RuntimeError for a tile not compiled."""
    outputs, channels = codes_NK.shape
    address = cuda_build.address
    error = cuda_build.load("fp8_gemm").fp8_gemm(
        *tile, address(rows.codes_RD), address(rows.scales_GR), address(codes_NK), address(scales_nk), address(y_TN),
        address(y_scale_GT), y_TN.shape[0], outputs, channels // BLOCK, groups, rows.scales_GR.stride(0),
        scales_nk.stride(0), y_TN.stride(0), 0 if y_scale_GT is None else y_scale_GT.stride(0),
        cuda_build.stream(codes_NK.device),
    )  # fmt: skip
    cuda_build.check(error, f"fp8_gemm({tile}, {tuple(y_TN.shape)}, {channels} channels)")


def fp8_product_gpu(
    rows: QuantizedRows, codes_NK: Tensor, scales_nk: Tensor, dtype: torch.dtype, groups: int = 1
) -> Tensor:
    """rows [T, G K]; codes uint8 [N, K]; scales uint8 E8M0 [N / 128, K / 128] -> `dtype` [T, N]."""
    num_rows, outputs = rows.codes_RD.shape[0], codes_NK.shape[0]
    if not num_rows or dtype != torch.bfloat16 or not fits_hopper(codes_NK, groups):
        return fp8_product(rows, codes_NK, scales_nk, dtype, groups)
    y = torch.empty(num_rows, outputs, dtype=dtype, device=codes_NK.device)
    launch_hopper(tile_for(num_rows, outputs // groups, codes_NK.shape[1]), rows, codes_NK, scales_nk, groups, y)
    return y


def fp8_product_codes(rows: QuantizedRows, codes_NK: Tensor, scales_nk: Tensor, groups: int = 1) -> QuantizedRows:
    """The bf16 values of fp8_product_gpu, quantised for the next product; to the bit as in two steps."""
    num_rows, outputs = rows.codes_RD.shape[0], codes_NK.shape[0]
    if num_rows < FEWEST_CODES or (outputs // groups) % (2 * BLOCK) or not fits_hopper(codes_NK, groups):
        return quantize_activations(fp8_product_gpu(rows, codes_NK, scales_nk, torch.bfloat16, groups))
    device = codes_NK.device
    codes = torch.empty(num_rows, outputs, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(outputs // BLOCK, scale_stride(num_rows), dtype=torch.float32, device=device)
    launch_hopper(code_tile_for(num_rows), rows, codes_NK, scales_nk, groups, codes, scales)
    return QuantizedRows(codes, scales)


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
