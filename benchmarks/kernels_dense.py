"""FP8 block products at Flash's size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels_timing import Call, Table, graph_us, isolated_us
from kernels.gpu_fp8_gemm import fp8_heads, fp8_product_codes, fp8_product_gpu
from kernels.quantize import QuantizedRows
from kernels.triton_quantize import quantize_activations

ROWS = (64, 256, 512, 16384)
Product = Callable[[Tensor, Tensor], object]
Peers = tuple[float | None, float | None, float | None, float | None]
SHAPES: dict[str, tuple[int, int, int, Peers]] = {
    "wq_b 1024->32768": (32768, 1024, 1, (12.4, 19.4, 31.9, 861)),
    "wo_b 8192->4096": (4096, 8192, 1, (12.4, 19.0, 26.4, 753)),
    "wq_a|wkv 4096->1536": (1536, 4096, 1, (6.2, 7.7, 9.6, 150)),
    "shared w1|w3 4096->4096": (4096, 4096, 1, (7.3, 11.3, 14.9, 382)),
    "shared w2 2048->4096": (4096, 2048, 1, (None, None, None, None)),
    "indexer wq_b 1024->8192": (8192, 1024, 1, (None, None, None, None)),
    "wo_a 8 x (4096->1024)": (8192, 4096, 8, (11.3, 16.6, 28.3, 962)),
}


def _measure(calls: list[Call], rows: int) -> tuple[float, str]:
    """Microseconds, and how they were taken: decode sizes in a graph over all calls, prefill sizes one by one."""
    return (graph_us(calls, 2 * len(calls)), "graph") if rows <= 512 else (isolated_us(calls[0], 7), "isolated")


def _values(rows: QuantizedRows, groups: int, codes: Tensor, scales: Tensor) -> object:
    return fp8_product_gpu(rows, codes, scales, torch.bfloat16, groups)


def _codes(rows: QuantizedRows, groups: int, codes: Tensor, scales: Tensor) -> object:
    return fp8_product_codes(rows, codes, scales, groups)


def _heads(rows: QuantizedRows, angles: tuple[Tensor, Tensor], codes: Tensor, scales: Tensor) -> object:
    return fp8_heads(rows, codes, scales, 512, angles, 1e-6)


def run_gemm(table: Table, quick: bool = False) -> None:
    for name, (outputs, channels, groups, peers) in SHAPES.items():
        weights = []
        for _ in range(max(1, 130_000_000 // (outputs * channels))):  # more than L2 holds
            codes = torch.randn(outputs, channels, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
            scales = torch.randint(118, 124, (outputs // 128, channels // 128), dtype=torch.uint8, device="cuda")
            weights.append((codes, scales))
        for rows, peer in zip(ROWS, peers, strict=True):
            if quick and rows == 16384:
                continue
            inputs = quantize_activations(torch.randn(rows, groups * channels, device="cuda").bfloat16())
            angles = (torch.randn(rows, 32, device="cuda"), torch.randn(rows, 32, device="cuda"))
            products: dict[str, Product] = {"": partial(_values, inputs, groups)}
            if groups > 1:
                products[", quantised"] = partial(_codes, inputs, groups)
            if outputs == 32768:
                products[", norm + RoPE"] = partial(_heads, inputs, angles)
            for what, product in products.items():
                us, how = _measure([partial(product, *weight) for weight in weights], rows)
                value_bytes = 1 if what == ", quantised" else 2
                num_bytes = outputs * channels + rows * (groups * channels + value_bytes * outputs)
                flop = 2.0 * rows * outputs * channels
                table.add(f"fp8 {name}{what}", f"M={rows}", us, num_bytes, flop, "fp8", None if what else peer, how)
    for rows in ROWS:
        x = torch.randn(rows, 32768 if rows <= 512 else 8192, device="cuda").bfloat16()
        us, how = _measure([partial(quantize_activations, x)], rows)
        table.add("quantise 1x128", f"{rows} x {x.shape[1]}", us, 3.0 * x.numel(), how=how)
