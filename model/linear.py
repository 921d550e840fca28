"""Weights as the layers hold them, and the one seam through which every projection runs.

A holder takes the checkpoint's tensor and, for quantised ones, its scale. By default it keeps the dequantised values in
the dtype it computes in; that is exact in float32 and bfloat16, because every stored value is a short float times a
power of two. With `packed` it keeps FP8 codes and scales for kernels.fp8_gemm.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.fp8_gemm import fp8_gemm
from kernels.moe import ExpertWeights
from kernels.quantize import dequantize_fp4, dequantize_fp8_tiles, simulate_fp8
from kernels.row_linear import row_linear
from model.config import EXPERT_GROUP, QUANT_TILE, ModelConfig


class Numerics(NamedTuple):
    """How one model computes."""

    dtype: torch.dtype
    """Activations."""
    simulate: bool
    """Round activations and cached rows as the released program does."""
    packed: bool
    """Keep FP8 and FP4 weights packed."""
    device: torch.device


class WeightHolder(Protocol):
    """Receives one weight of the checkpoint."""

    def load(self, weight: Tensor, scale: Tensor | None) -> None: ...


def dequantize(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Checkpoint tensor and scale -> float32 values; unquantised tensors pass through."""
    if scale is None:
        return weight
    scale_bytes = scale.view(torch.uint8)
    if weight.dtype == torch.int8:
        return dequantize_fp4(weight.view(torch.uint8), scale_bytes, EXPERT_GROUP)
    return dequantize_fp8_tiles(weight.view(torch.uint8), scale_bytes, QUANT_TILE)


class Weight:
    """One tensor, kept in one dtype. `value` exists once it is loaded."""

    value: Tensor

    def __init__(self, dtype: torch.dtype, numerics: Numerics) -> None:
        self._dtype, self._device = dtype, numerics.device

    def load(self, weight: Tensor, scale: Tensor | None) -> None:
        self.value = dequantize(weight, scale).to(self._device, self._dtype)


class HyperScale(Weight):
    """The three scales of a hyper-connection, one per value they multiply."""

    def __init__(self, streams: int, numerics: Numerics) -> None:
        super().__init__(torch.float32, numerics)
        self._repeats = torch.tensor([streams, streams, streams * streams])

    def load(self, weight: Tensor, scale: Tensor | None) -> None:
        super().load(weight.repeat_interleave(self._repeats), scale)


class StackedWeight:
    """Weights that multiply the same input, as one matrix: [sum of rows, columns] in one dtype."""

    def __init__(self, rows: tuple[int, ...], columns: int, dtype: torch.dtype, numerics: Numerics) -> None:
        self.rows = rows
        self.value = torch.empty(sum(rows), columns, dtype=dtype, device=numerics.device)

    def part(self, number: int) -> WeightHolder:
        """Where the weight with rows[number] rows goes."""
        start = sum(self.rows[:number])
        return _Slice(self.value[start : start + self.rows[number]], None)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = row_linear(x, self.value).split(self.rows, -1)
        return parts


class Linear:
    """x W^T without bias, W stored [out, in] in FP8 with 128 x 128 scales; one or more W that share their input.

    Under the released numerics the input is rounded to e4m3 per token and 128 channels."""

    def __init__(self, rows: int | tuple[int, ...], columns: int, numerics: Numerics) -> None:
        self._numerics = numerics
        self._parts = (rows,) if isinstance(rows, int) else rows
        total = sum(self._parts)
        self.weight: Tensor | None = None
        self.codes: Tensor | None = None
        self.scales: Tensor | None = None
        if numerics.packed:
            if any(rows % QUANT_TILE for rows in self._parts[:-1]):
                raise ValueError(f"packed weights of {self._parts} rows do not stack: scales cover {QUANT_TILE} rows")
            tiles = (-(-total // QUANT_TILE), -(-columns // QUANT_TILE))
            self.codes = torch.empty(total, columns, dtype=torch.uint8, device=numerics.device)
            self.scales = torch.empty(tiles, dtype=torch.uint8, device=numerics.device)
        else:
            self.weight = torch.empty(total, columns, dtype=numerics.dtype, device=numerics.device)

    def part(self, number: int = 0) -> WeightHolder:
        """Where the weight with rows[number] rows goes."""
        start = sum(self._parts[:number])
        rows = slice(start, start + self._parts[number])
        if self.codes is not None and self.scales is not None:
            tiles = slice(start // QUANT_TILE, -(-rows.stop // QUANT_TILE))
            return _Slice(self.codes[rows], self.scales[tiles])
        assert self.weight is not None
        return _Slice(self.weight[rows], None)

    def __call__(self, x: Tensor) -> Tensor:
        """-> [..., sum of rows]."""
        if self.codes is not None and self.scales is not None:
            return fp8_gemm(x, self.codes, self.scales)
        assert self.weight is not None
        return row_linear(simulate_fp8(x, QUANT_TILE) if self._numerics.simulate else x, self.weight)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """-> one output per stacked weight."""
        parts: tuple[Tensor, ...] = self(x).split(self._parts, -1)
        return parts


class ExpertBank:
    """The routed experts this rank holds, stacked."""

    def __init__(self, config: ModelConfig, experts: range, numerics: Numerics) -> None:
        self._numerics = numerics
        hidden, width, count = config.hidden_size, config.moe_intermediate_size, len(experts)
        self._width = width

        def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, rows, columns, dtype=dtype, device=numerics.device)

        if numerics.packed:
            self.weights = ExpertWeights(
                experts.start,
                empty(2 * width, hidden // 2, torch.uint8),
                empty(hidden, width // 2, torch.uint8),
                empty(2 * width, hidden // EXPERT_GROUP, torch.uint8),
                empty(hidden, width // EXPERT_GROUP, torch.uint8),
            )
        else:
            self.weights = ExpertWeights(
                experts.start,
                empty(2 * width, hidden, numerics.dtype),
                empty(hidden, width, numerics.dtype),
            )

    def holder(self, expert: int, matrix: str) -> WeightHolder:
        """Where `matrix` ("w1" gate, "w2" down, "w3" up) of `expert` (a global number) goes."""
        local = expert - self.weights.first
        rows = {"w1": slice(0, self._width), "w2": slice(None), "w3": slice(self._width, None)}[matrix]
        values, scales = self.weights.w13, self.weights.w13_scale
        if matrix == "w2":
            values, scales = self.weights.w2, self.weights.w2_scale
        return _Slice(values[local, rows], None if scales is None else scales[local, rows])


class _Slice:
    """Rows of a larger matrix: values in their final dtype, or codes with scales."""

    def __init__(self, values: Tensor, scales: Tensor | None) -> None:
        self._values, self._scales = values, scales

    def load(self, weight: Tensor, scale: Tensor | None) -> None:
        if self._scales is None:
            self._values.copy_(dequantize(weight, scale))
            return
        if scale is None:
            raise ValueError("packed weights are loaded from quantised ones only")
        self._values.copy_(weight.view(torch.uint8))
        self._scales.copy_(scale.view(torch.uint8))
