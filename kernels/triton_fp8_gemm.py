"""W8A8 products with block scales in Triton: y = x W^T, also per group of channels (specification: kernels.fp8_gemm).

T rows, N outputs, K channels. Rows e4m3 with a scale per 128 channels, weight e4m3 with an E8M0 scale per 128 x 128
tile; float32 sums per 128 channels, each multiplied by both scales. Grouped: outputs [g R, (g + 1) R) see channels
[g K, (g + 1) K) of x, R a multiple of 128.

Few rows: the weight is the tall operand, so that 16 rows waste nothing, and K is split over programs until the chip is
full; the program that finishes a tile last adds the parts in order, so results do not depend on timing. Bound by the
read of the weight. Many rows: 128 x 128 tiles through the copy engine; bound by the FP8 tensor cores.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton_common import INTERPRET, from_exponent_byte, to_bf16
from kernels.triton_quantize import QuantizedRows, quantize_activations

BLOCK = 128
FEW_ROWS = 64
MAX_SPLIT = 16
MAX_COUNTERS = 1 << 16
"""Tiles of one split product; splitting is pointless long before."""
MAX_STREAMS = 16


@triton.jit
def _few_rows_kernel(
    w, w_scale, x, x_scale, y, parts, counters, num_rows, outputs, channels, group_outputs, stages,
    stride_w, stride_ws, stride_x, stride_xs, stride_y,
    TILE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tile * TILE
    output = (first + tl.arange(0, TILE)).to(tl.int64)
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inner = tl.arange(0, 128)
    x_rows = x + row[:, None] * stride_x + (first // group_outputs).to(tl.int64) * channels
    total = tl.zeros((TILE, ROWS), tl.float32)
    for stage in range(split * stages // SPLIT, (split + 1) * stages // SPLIT):
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
    if SPLIT == 1:
        tl.store(target, to_bf16(total, INTERPRET) if BF16 else total, mask=live)
    else:
        place = tl.arange(0, TILE)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        number = tile * tl.num_programs(2) + block
        mine = parts + number.to(tl.int64) * SPLIT * TILE * ROWS
        tl.store(mine + split * TILE * ROWS + place, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + number, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            tl.store(counters + number, 0)
            total = tl.load(mine + place, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                total += tl.load(mine + other * TILE * ROWS + place, cache_modifier=".cg")
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
def _all_counters(device: torch.device) -> Tensor:
    return torch.zeros(MAX_STREAMS, MAX_COUNTERS, dtype=torch.int32, device=device)


_streams: dict[int, int] = {}


def arrival_counters(device: torch.device) -> Tensor:
    """Arrival counters of split products: zero between launches, because the last arrival resets its own. Launches on
    different streams may run at the same time and have different ones."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _all_counters(device)[_streams.setdefault(stream, len(_streams) % MAX_STREAMS)]


@lru_cache(maxsize=8)
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _split_for(programs: int, stages: int, device: torch.device) -> int:
    """Parts of K that give every multiprocessor about two programs, each with at least four stages to stream."""
    wanted = 2 * num_multiprocessors(device) // max(1, programs)
    split = 1
    while split < MAX_SPLIT and 2 * split <= wanted and stages // (2 * split) >= 4:
        split *= 2
    return split


def _few_rows(
    rows: QuantizedRows, w_NK: Tensor, scales_nk: Tensor, y_TN: Tensor, groups: int, split: int | None = None
) -> None:
    num_rows, outputs, channels = y_TN.shape[0], w_NK.shape[0], w_NK.shape[1]
    tile, block = 64, max(16, min(FEW_ROWS, triton.next_power_of_2(num_rows)))
    stages, blocks = -(-channels // BLOCK), triton.cdiv(num_rows, block)
    tiles = triton.cdiv(outputs, tile)
    if split is None:
        split = _split_for(tiles * blocks, stages, w_NK.device)
    if tiles * blocks > MAX_COUNTERS:
        split = 1
    parts = y_TN.new_empty(tiles * blocks * split * tile * block if split > 1 else 1, dtype=torch.float32)
    codes = rows.codes_RD
    _few_rows_kernel[(tiles, split, blocks)](
        w_NK, scales_nk, codes, rows.scales_GR, y_TN, parts, arrival_counters(w_NK.device), num_rows, outputs, channels,
        outputs // groups, stages, w_NK.stride(0), scales_nk.stride(0), codes.stride(0), rows.scales_GR.stride(0),
        y_TN.stride(0), TILE=tile, ROWS=block, SPLIT=split, EVEN=outputs % tile == 0 and channels % BLOCK == 0,
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


def fp8_product(
    rows: QuantizedRows, codes_NK: Tensor, scales_nk: Tensor, dtype: torch.dtype, groups: int = 1
) -> Tensor:
    """Quantised rows [T, groups K], codes uint8 or e4m3 [N, K], scales E8M0 uint8 [N / 128, K / 128] -> `dtype` [T, N].

    Raises ValueError where grouped shapes fill no blocks."""
    num_rows, outputs, channels = rows.codes_RD.shape[0], codes_NK.shape[0], codes_NK.shape[1]
    if rows.codes_RD.shape[1] != groups * channels:
        raise ValueError(f"rows have {rows.codes_RD.shape[1]} channels, the weight {groups} x {channels}")
    if groups > 1 and (channels % BLOCK or outputs % (groups * BLOCK)):
        raise ValueError(f"grouped products need multiples of {BLOCK}, not {outputs // groups} x {channels} a group")
    y = torch.empty(num_rows, outputs, dtype=dtype, device=codes_NK.device)
    if num_rows and outputs:
        weight = codes_NK.view(torch.float8_e4m3fn)
        copyable = channels % 16 == 0
        (_many_rows if num_rows > FEW_ROWS and copyable else _few_rows)(rows, weight, scales_nk, y, groups)
    return y


def fp8_gemm_triton(x_TK: Tensor, codes_NK: Tensor, scales_nk: Tensor) -> Tensor:
    """kernels.fp8_gemm.fp8_gemm: quantises x, multiplies, -> like x."""
    return fp8_product(quantize_activations(x_TK), codes_NK, scales_nk, x_TK.dtype)


def grouped_output_fp8(x_TGC: Tensor, codes_NC: Tensor, scales_nc: Tensor) -> Tensor:
    """The grouped output projection in FP8: x [T, G, C], codes [G R, C], scales [G R / 128, C / 128] -> [T, G R].

    Rounds its input to e4m3, which the released program does not (it multiplies in bf16); servers do."""
    groups = x_TGC.shape[1]
    return fp8_product(quantize_activations(x_TGC.flatten(1)), codes_NC, scales_nc, x_TGC.dtype, groups)
