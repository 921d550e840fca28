"""Routed experts on the GPU: sort, quantise, two grouped GEMMs, combine (specification: kernels.moe.routed_experts).

T tokens, D hidden, I expert width, K experts a token. Numerics of the released program: e4m3 inputs in blocks of 128 of
both products, the routing weight inside the SwiGLU, outputs of an expert rounded to bf16, their sum in float32.
Hopper runs kernels/cuda/experts_few.cu and experts_many.cu on packed weights, anything else the Triton kernels on
checkpoint layout.
Bound: 4.25 bits per weight of every expert hit; from about 64 rows an expert, the FP8 tensor cores.
"""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.exchange_rows import QuantizedTokens
from kernels.moe import ExpertWeights
from kernels.packed_experts import STAGE_K, TILE_ROWS, PackedBank, PackedExperts, fits_packing, pack_bank
from kernels.triton_expert_rows import (
    combine_rows,
    quantize_rows,
    sort_by_expert,
)
from kernels.triton_experts import experts_down, experts_up
from kernels.triton_quantize import QuantizedRows, scale_stride

__all__ = ["PackedBank", "pack_bank"]

BLOCK_ROWS = (8, 16, 32, 48, 64, 128)
"""Rows of one expert computed together, as compiled in experts_few.cu and, the last, in experts_many.cu."""

MEAN_OF_MANY = 352
"""Mean rows of an expert from which experts_many.cu is faster than blocks of 64."""

RING_EXPERTS = 4
"""Experts whose weights experts_many.cu holds expanded: some that are read, some that are written."""
FULL_EXPERTS, FULL_RING = 4096, 3
"""From so many row slots an expert on, of which a rank of four uses a quarter, fewer of them: they stay in L2."""


def block_rows_for(num_tokens: int, topk: int, total_experts: int) -> int:
    """Rows computed together: the mean of an expert's rows under even routing plus 2.5 standard deviations, so that
    nearly every expert's weights are read once; from MEAN_OF_MANY the largest."""
    mean = num_tokens * topk / total_experts
    wanted = mean + 2.5 * mean**0.5
    few = next((size for size in BLOCK_ROWS[:-1] if size >= wanted), BLOCK_ROWS[-2])
    return few if mean < MEAN_OF_MANY else BLOCK_ROWS[-1]


def _launch(
    up: bool,
    block_rows: int,
    rows: QuantizedRows,
    matrix: PackedExperts,
    offsets_E: Tensor,
    output: Tensor,
    output_scale: Tensor | None = None,
    route_weight_R: Tensor | None = None,
    limit: float = 0.0,
) -> None:
    experts, tiles, stages, _ = matrix.data.shape
    codes, device = rows.codes_RD, rows.codes_RD.device
    if codes.shape[1] != stages * STAGE_K:
        raise ValueError(f"rows have {codes.shape[1]} channels, the experts {stages * STAGE_K}")
    address = cuda_build.address
    operands = (
        address(codes), address(rows.scales_GR), codes.shape[0], stages, rows.scales_GR.stride(0),
        address(matrix.data), address(matrix.row_scale), address(offsets_E), address(route_weight_R), address(output),
        address(output_scale), experts, tiles, c_float(limit),
    )  # fmt: skip
    if block_rows < BLOCK_ROWS[-1]:
        grid = torch.cuda.get_device_properties(device).multi_processor_count
        launch = cuda_build.load("experts_few").experts_few
        error = launch(int(up), block_rows, *operands, grid, cuda_build.stream(device))
    else:
        held = FULL_RING if codes.shape[0] >= FULL_EXPERTS * experts else RING_EXPERTS
        ring = torch.empty(held, tiles * TILE_ROWS, stages * STAGE_K, dtype=torch.uint8, device=device)
        counters = torch.zeros(2 + 2 * experts, dtype=torch.int32, device=device)
        launch = cuda_build.load("experts_many").experts_many
        error = launch(
            int(up), *operands, address(ring), address(counters), held, cuda_build.stream(device)
        )  # fmt: skip
    cuda_build.check(error, f"experts({'up' if up else 'down'}, block_rows={block_rows})")


def packed_up(
    rows: QuantizedRows, matrix: PackedExperts, offsets_E: Tensor, route_weight_R: Tensor, limit: float, block_rows: int
) -> QuantizedRows:
    """As triton_experts.experts_up, on packed weights."""
    num_rows, width = rows.codes_RD.shape[0], matrix.row_scale.shape[1] // 2
    h = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=rows.codes_RD.device)
    h_scale = torch.empty(width // STAGE_K, scale_stride(num_rows), dtype=torch.float32, device=h.device)
    if num_rows:
        _launch(True, block_rows, rows, matrix, offsets_E, h, h_scale, route_weight_R, limit)
    return QuantizedRows(h, h_scale)


def packed_down(rows: QuantizedRows, matrix: PackedExperts, offsets_E: Tensor, block_rows: int) -> Tensor:
    """As triton_experts.experts_down, on packed weights."""
    num_rows, hidden = rows.codes_RD.shape[0], matrix.row_scale.shape[1]
    y = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=rows.codes_RD.device)
    if num_rows:
        _launch(False, block_rows, rows, matrix, offsets_E, y)
    return y


def fits_hopper(width: int, hidden: int) -> bool:
    """Whether experts of this width and this machine can run the packed kernel."""
    try:
        cuda_build.load("experts_few")
        cuda_build.load("experts_many")
    except cuda_build.CudaUnavailable:
        return False
    return fits_packing(2 * width, hidden) and fits_packing(hidden, width)


def routed_experts_gpu(
    x_TD: Tensor | QuantizedTokens, experts_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights | PackedBank, *,
    limit: float, block_rows: int, shared_TD: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """x bf16 [T, D] or quantised; experts int [T, K]; weights float32 [T, K]; a token's choices lie together. -> sum
    over local experts as combine_rows gives it. `block_rows`: see block_rows_for; it changes speed, never a bit of the
    result."""
    num_local = bank.up.data.shape[0] if isinstance(bank, PackedBank) else bank.w13.shape[0]
    rows = sort_by_expert(experts_TK, bank.first, num_local)
    inputs, route_weight = quantize_rows(x_TD, weights_TK, rows)
    if isinstance(bank, PackedBank):
        hidden = packed_up(inputs, bank.up, rows.offsets_E, route_weight, limit, block_rows)
        y = packed_down(hidden, bank.down, rows.offsets_E, block_rows)
    else:
        assert bank.w13_scale is not None
        assert bank.w2_scale is not None
        tile = min(max(block_rows, 16), 64)
        tile = 1 << (tile - 1).bit_length()
        hidden = experts_up(inputs, bank.w13, bank.w13_scale, rows.offsets_E, route_weight, limit, tile)
        y = experts_down(hidden, bank.w2, bank.w2_scale, rows.offsets_E, tile)
    return combine_rows(y, rows, shared_TD, dtype)
