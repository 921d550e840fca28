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
from kernels.grouped_output import grouped_output, grouped_output_fp8
from kernels.moe import ExpertWeights
from kernels.packed_experts import PackedBank, empty_bank, fill_random, gate_up_order, pack_matrix
from kernels.quantize import QuantizedRows, dequantize_fp4, dequantize_fp8_tiles, simulate_fp8
from kernels.query_heads import QueryHeads, query_heads
from kernels.row_linear import row_linear
from kernels.wide_linear import wide_linear
from model.config import EXPERT_GROUP, QUANT_TILE, ModelConfig
from model.random_weights import generator_of


class Numerics(NamedTuple):
    """How one model computes."""

    dtype: torch.dtype
    """Activations."""
    simulate: bool
    """Round activations and cached rows as the released program does."""
    packed: bool
    """Keep FP8 and FP4 weights packed."""
    device: torch.device
    fp8_output: bool = False
    """Round the input of the first output projection like every other's, which the released program does not."""

    @property
    def wide(self) -> torch.dtype:
        """Of weights whose products stay in float32: see kernels.wide_linear."""
        return torch.bfloat16 if self.device.type == "cuda" and self.dtype == torch.bfloat16 else torch.float32


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
        self.dtype, self._device = dtype, numerics.device

    def load(self, weight: Tensor, scale: Tensor | None) -> None:
        scale = None if scale is None else scale.to(self._device)
        self.value = dequantize(weight.to(self._device), scale).to(self.dtype)


class HyperScale(Weight):
    """The three scales of a hyper-connection, one per value they multiply."""

    def __init__(self, streams: int, numerics: Numerics) -> None:
        super().__init__(torch.float32, numerics)
        self._repeats = torch.tensor([streams, streams, streams * streams])

    def load(self, weight: Tensor, scale: Tensor | None) -> None:
        super().load(weight.cpu().repeat_interleave(self._repeats), scale)


class StackedWeight:
    """Weights that multiply the same input, as one matrix [sum of rows, columns], with float32 products."""

    def __init__(self, rows: tuple[int, ...], columns: int, numerics: Numerics) -> None:
        self.rows = rows
        self.value = torch.empty(sum(rows), columns, dtype=numerics.wide, device=numerics.device)

    def part(self, number: int) -> WeightHolder:
        """Where the weight with rows[number] rows goes."""
        start = sum(self.rows[:number])
        return _Slice(self.value[start : start + self.rows[number]], None)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """-> float32, one output per stacked weight."""
        parts: tuple[Tensor, ...] = wide_linear(x, self.value).split(self.rows, -1)
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

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """-> [..., sum of rows]. Quantised rows come from GPU kernels, for packed weights."""
        if self.codes is not None and self.scales is not None:
            return fp8_gemm(x, self.codes, self.scales)
        assert self.weight is not None
        assert isinstance(x, Tensor)
        return row_linear(simulate_fp8(x, QUANT_TILE) if self._numerics.simulate else x, self.weight)

    def heads(self, x: Tensor | QuantizedRows, head_dim: int, angles: tuple[Tensor, Tensor], eps: float) -> QueryHeads:
        """Query heads of the latent x [T, R], normed and rotated if that costs no pass of its own."""
        if self.codes is not None and self.scales is not None:
            return query_heads(x, self.codes, self.scales, head_dim, angles, eps)
        return QueryHeads(self(x).unflatten(-1, (-1, head_dim)))

    def split(self, x: Tensor | QuantizedRows) -> tuple[Tensor, ...]:
        """-> one output per stacked weight."""
        parts: tuple[Tensor, ...] = self(x).split(self._parts, -1)
        return parts


class GroupedOutput(Linear):
    """First half of the output projection (kernels.grouped_output), in FP8 or in the activation dtype."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        columns = config.heads_per_group * config.head_dim
        if numerics.fp8_output and (config.o_lora_rank % QUANT_TILE or columns % QUANT_TILE):
            raise ValueError(
                f"fp8_output: {config.o_lora_rank} x {columns} weights of a group are not tiles of {QUANT_TILE}"
            )
        how = numerics if numerics.fp8_output else numerics._replace(packed=False, simulate=False)
        super().__init__(config.o_groups * config.o_lora_rank, columns, how)

    @property
    def takes_codes(self) -> bool:
        """Whether heads may come quantised, rotated back already."""
        return self.codes is not None

    def from_heads(self, x_THD: Tensor | QuantizedRows, angles: tuple[Tensor, Tensor]) -> Tensor | QuantizedRows:
        """Heads as attention leaves them, and the angles to rotate them back by; x may be overwritten. -> [T, outputs],
        for the second half."""
        if self.codes is not None and self.scales is not None:
            return grouped_output_fp8(x_THD, angles, self.codes, self.scales)
        assert self.weight is not None
        assert isinstance(x_THD, Tensor)
        return grouped_output(x_THD, angles, self.weight, simulate=self._numerics.simulate)


class ExpertBank:
    """The routed experts this rank holds, stacked: dequantised, in the checkpoint's layout, or in the order of the
    Hopper kernel where that runs here."""

    def __init__(self, config: ModelConfig, experts: range, numerics: Numerics, *, hopper: bool | None = None) -> None:
        """hopper: the order of packed experts; None: what this machine can run."""
        self._numerics = numerics
        hidden, width, count = config.hidden_size, config.moe_intermediate_size, len(experts)
        self._width = width
        self._hopper: _HopperExperts | None = None
        self.weights: ExpertWeights | PackedBank

        def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, rows, columns, dtype=dtype, device=numerics.device)

        if numerics.packed and (_runs_hopper(numerics.device, width, hidden) if hopper is None else hopper):
            self.weights = empty_bank(experts.start, count, width, hidden, numerics.device)
            self._hopper = _HopperExperts(self.weights, width)
        elif numerics.packed:
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
        if self._hopper is not None:
            return _HopperMatrix(self._hopper, local, matrix)
        assert isinstance(self.weights, ExpertWeights)
        rows = {"w1": slice(0, self._width), "w2": slice(None), "w3": slice(self._width, None)}[matrix]
        values, scales = self.weights.w13, self.weights.w13_scale
        if matrix == "w2":
            values, scales = self.weights.w2, self.weights.w2_scale
        return _Slice(values[local, rows], None if scales is None else scales[local, rows])

    def fill_random(self, prefix: str, seed: int) -> bool:
        """Random experts drawn where they will lie, if their layout allows; False leaves that to the holders. An expert
        is the same on whatever rank it is: drawn from `seed`, `prefix` and its global number."""
        if self._hopper is None:
            return False
        for matrix, packed in (("up", self._hopper.bank.up), ("down", self._hopper.bank.down)):
            first, count, device = self.weights.first, len(packed.data), self._numerics.device
            names = (f"{prefix}.{expert}.{matrix}" for expert in range(first, first + count))
            fill_random(packed, (generator_of(name, seed, device) for name in names))
        return True


def _runs_hopper(device: torch.device, width: int, hidden: int) -> bool:
    if device.type != "cuda":
        return False
    from kernels.gpu_experts import fits_hopper

    return fits_hopper(width, hidden)


class _HopperExperts:
    """Packs matrices as they come. Gate and up rows lie mixed, so the first of the two waits for the other."""

    def __init__(self, bank: PackedBank, width: int) -> None:
        self.bank = bank
        self._order = gate_up_order(width, bank.up.data.device)
        self._waiting: dict[int, tuple[str, Tensor, Tensor]] = {}

    def take(self, local: int, matrix: str, codes: Tensor, scales: Tensor) -> None:
        if matrix == "w2":
            self.bank.down.data[local], self.bank.down.row_scale[local] = pack_matrix(codes, scales)
        elif local not in self._waiting:
            self._waiting[local] = (matrix, codes, scales)
        else:
            other, *half = self._waiting.pop(local)
            first, second = ((codes, scales), half) if other == "w3" else (half, (codes, scales))
            both_codes, both_scales = (torch.cat(pair)[self._order] for pair in zip(first, second, strict=True))
            self.bank.up.data[local], self.bank.up.row_scale[local] = pack_matrix(both_codes, both_scales)


class _HopperMatrix:
    """One matrix on its way into `_HopperExperts`."""

    def __init__(self, experts: _HopperExperts, local: int, matrix: str) -> None:
        self._experts, self._local, self._matrix = experts, local, matrix

    def load(self, weight: Tensor, scale: Tensor | None) -> None:
        if scale is None:
            raise ValueError("packed weights are loaded from quantised ones only")
        device = self._experts.bank.up.data.device
        codes, scales = weight.view(torch.uint8).to(device), scale.view(torch.uint8).to(device)
        self._experts.take(self._local, self._matrix, codes, scales)


class _Slice:
    """Rows of a larger matrix: values in their final dtype, or codes with scales."""

    def __init__(self, values: Tensor, scales: Tensor | None) -> None:
        self._values, self._scales = values, scales

    def load(self, weight: Tensor, scale: Tensor | None) -> None:
        if self._scales is None:
            device = self._values.device
            self._values.copy_(dequantize(weight.to(device), None if scale is None else scale.to(device)))
            return
        if scale is None:
            raise ValueError("packed weights are loaded from quantised ones only")
        self._values.copy_(weight.view(torch.uint8))
        self._scales.copy_(scale.view(torch.uint8))
