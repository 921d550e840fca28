"""W8A8 products with block scales in Triton: y = x W^T, also per group of channels (specification: kernels.fp8_gemm).

T rows, N outputs, K channels. Rows e4m3 with a scale per 128 channels, weight e4m3 with an E8M0 scale per 128 x 128
tile; float32 sums per 128 channels, each multiplied by both scales. Grouped: outputs [g R, (g + 1) R) see channels
[g K, (g + 1) K) of x, R a multiple of 128.

For GPUs and shapes that gpu_fp8_gemm's CUDA kernel does not know. Few rows: the weight is the tall operand, so that 16
rows waste nothing. Many rows: 128 x 128 tiles through the copy engine. Both add in the same order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton_common import INTERPRET, from_exponent_byte, to_bf16
from kernels.triton_quantize import QuantizedRows

BLOCK = 128
FEW_ROWS = 64


@triton.jit
def _few_rows_kernel(
    w, w_scale, x, x_scale, y, num_rows, outputs, channels, group_outputs, stages,
    stride_w, stride_ws, stride_x, stride_xs, stride_y,
    TILE: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    first, block = tl.program_id(0) * TILE, tl.program_id(1)
    output = (first + tl.arange(0, TILE)).to(tl.int64)
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inner = tl.arange(0, 128)
    x_rows = x + row[:, None] * stride_x + (first // group_outputs).to(tl.int64) * channels
    total = tl.zeros((TILE, ROWS), tl.float32)
    for stage in range(stages):
        column = stage * 128 + inner
        if EVEN:
            weight = tl.load(w + output[:, None] * stride_w + column[None, :])
            rows = tl.load(x_rows + column[None, :], mask=(row < num_rows)[:, None], other=0.0)
        else:
            inside = (column < channels)[None, :]
            weight = tl.load(
                w + output[:, None] * stride_w + column[None, :], mask=(output < outputs)[:, None] & inside, other=0.0
            )
            rows = tl.load(x_rows + column[None, :], mask=(row < num_rows)[:, None] & inside, other=0.0)
        scale = from_exponent_byte(tl.load(w_scale + (first // 128) * stride_ws + stage))
        groups_before = (first // group_outputs) * stages
        factor = tl.load(
            x_scale + (groups_before + stage).to(tl.int64) * stride_xs + row, mask=row < num_rows, other=0.0
        )
        total += tl.dot(weight, tl.trans(rows)) * (factor * scale)[None, :]
    live = (output < outputs)[:, None] & (row < num_rows)[None, :]
    target = y + row[None, :] * stride_y + output[:, None]
    tl.store(target, to_bf16(total, INTERPRET) if BF16 else total, mask=live)


@triton.jit
def _many_rows_kernel(
    x, w, w_scale, x_scale, y, num_rows, outputs, channels, group_outputs, stages, stride_ws, stride_xs, stride_y,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # Programs walk bands of BAND row tiles down all column tiles, so that neighbours share operands in L2.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(num_rows, TILE_M), tl.cdiv(outputs, TILE_N)
    band = program // (BAND * tiles_n)
    height = min(tiles_m - band * BAND, BAND)
    tile_m = band * BAND + (program % (BAND * tiles_n)) % height
    tile_n = (program % (BAND * tiles_n)) // height
    group = (tile_n * TILE_N) // group_outputs
    row = tile_m * TILE_M + tl.arange(0, TILE_M)
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for stage in range(stages):
        rows = x.load([tile_m * TILE_M, group * channels + stage * 128])
        weight = w.load([tile_n * TILE_N, stage * 128])
        scale = from_exponent_byte(tl.load(w_scale + (tile_n * TILE_N // 128) * stride_ws + stage))
        factor = tl.load(
            x_scale + (group * stages + stage).to(tl.int64) * stride_xs + row, mask=row < num_rows, other=0.0
        )
        total += tl.dot(rows, tl.trans(weight)) * (factor * scale)[:, None]
    output = tile_n * TILE_N + tl.arange(0, TILE_N)
    target = y + row.to(tl.int64)[:, None] * stride_y + output[None, :]
    live = (row < num_rows)[:, None] & (output < outputs)[None, :]
    tl.store(target, to_bf16(total, INTERPRET) if BF16 else total, mask=live)


@lru_cache(maxsize=8)
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _few_rows(rows: QuantizedRows, w_NK: Tensor, scales_nk: Tensor, y_TN: Tensor, groups: int) -> None:
    num_rows, outputs, channels = y_TN.shape[0], w_NK.shape[0], w_NK.shape[1]
    tile, block = 64, max(16, min(FEW_ROWS, triton.next_power_of_2(num_rows)))
    codes = rows.codes_RD
    _few_rows_kernel[(triton.cdiv(outputs, tile), triton.cdiv(num_rows, block))](
        w_NK, scales_nk, codes, rows.scales_GR, y_TN, num_rows, outputs, channels, outputs // groups,
        -(-channels // BLOCK), w_NK.stride(0), scales_nk.stride(0), codes.stride(0), rows.scales_GR.stride(0),
        y_TN.stride(0), TILE=tile, ROWS=block, EVEN=outputs % tile == 0 and channels % BLOCK == 0,
        BF16=y_TN.dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=4, num_stages=4,
    )  # fmt: skip


def _many_rows(rows: QuantizedRows, w_NK: Tensor, scales_nk: Tensor, y_TN: Tensor, groups: int) -> None:
    num_rows, outputs, channels = y_TN.shape[0], w_NK.shape[0], w_NK.shape[1]
    x_map = TensorDescriptor.from_tensor(rows.codes_RD, [BLOCK, BLOCK])
    w_map = TensorDescriptor.from_tensor(w_NK, [BLOCK, BLOCK])
    grid = (triton.cdiv(num_rows, BLOCK) * triton.cdiv(outputs, BLOCK),)
    _many_rows_kernel[grid](
        x_map, w_map, scales_nk, rows.scales_GR, y_TN, num_rows, outputs, channels, outputs // groups,
        -(-channels // BLOCK), scales_nk.stride(0), rows.scales_GR.stride(0), y_TN.stride(0),
        TILE_M=BLOCK, TILE_N=BLOCK, BAND=8, BF16=y_TN.dtype == torch.bfloat16, INTERPRET=INTERPRET,
        num_warps=8, num_stages=4,
    )  # fmt: skip


def check_product(rows: QuantizedRows, codes_NK: Tensor, groups: int) -> None:
    """Raises ValueError where rows and weight do not belong together or groups fill no blocks."""
    outputs, channels = codes_NK.shape
    if rows.codes_RD.shape[1] != groups * channels:
        raise ValueError(f"rows have {rows.codes_RD.shape[1]} channels, the weight {groups} x {channels}")
    if groups > 1 and (channels % BLOCK or outputs % (groups * BLOCK)):
        raise ValueError(f"grouped products need multiples of {BLOCK}, not {outputs // groups} x {channels} a group")


def fp8_product(
    rows: QuantizedRows, codes_NK: Tensor, scales_nk: Tensor, dtype: torch.dtype, groups: int = 1
) -> Tensor:
    """Quantised rows [T, groups K], codes uint8 or e4m3 [N, K], scales E8M0 uint8 [N / 128, K / 128] -> `dtype` [T, N].

    Raises ValueError: see check_product."""
    check_product(rows, codes_NK, groups)
    num_rows, outputs, channels = rows.codes_RD.shape[0], codes_NK.shape[0], codes_NK.shape[1]
    y = torch.empty(num_rows, outputs, dtype=dtype, device=codes_NK.device)
    if num_rows and outputs:
        weight = codes_NK.view(torch.float8_e4m3fn)
        copyable = channels % 16 == 0
        (_many_rows if num_rows > FEW_ROWS and copyable else _few_rows)(rows, weight, scales_nk, y, groups)
    return y
