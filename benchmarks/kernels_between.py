"""What lies between the big kernels, at Flash's size: hyper-connections, and products that stay in float32."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernels_timing import Call, Table, graph_us, isolated_us
from kernels.hyper_connection import HyperSettings, HyperWeights, Mix, hyper_post_pre, hyper_pre
from kernels.triton_hyper_connection import hyper_post_pre_triton
from kernels.wide_linear import wide_linear

ROWS = (64, 256, 512, 16384)
HIDDEN = 4096
SETTINGS = HyperSettings(iterations=20, hc_eps=1e-6, norm_eps=1e-6)
SEAM_PEERS = (11.6, 18.6, 25.6, 627.0)
PRODUCTS = {
    "router 4096->256": (256, (6.3, 6.6, 7.3, 49.4)),
    "HCA projections 4096->1024": (1024, (6.6, 8.7, 10.2, 210.0)),
    "CSA projections 4096->2624": (2624, (None, None, None, None)),
    "LM head 4096->129280": (129_280, (294.0, 391.0, 763.0, None)),
}


def _measure(calls: list[Call], rows: int) -> tuple[float, str]:
    """Microseconds, and how they were taken: decode sizes in a graph over all calls, prefill sizes one by one."""
    return (graph_us(calls, 2 * len(calls)), "graph") if rows <= 512 else (isolated_us(calls[0], 7), "isolated")


def run_hyper(table: Table, quick: bool = False) -> None:
    """The seam as this machine runs it, alone and with the e4m3 form of the input, and in Triton."""
    weights = HyperWeights(
        torch.randn(24, 4 * HIDDEN, device="cuda") / 64, torch.randn(24, device="cuda"), torch.rand(24, device="cuda")
    )
    norm = torch.rand(HIDDEN, device="cuda") + 0.5
    for rows, peer in zip(ROWS, SEAM_PEERS, strict=True):
        plain: list[Call] = []
        quantised: list[Call] = []
        triton: list[Call] = []
        for _ in range(max(1, min(6, 1024 // rows))):
            streams = torch.randn(rows, 4, HIDDEN, device="cuda").bfloat16()
            output = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
            _, mix = hyper_pre(streams, weights, norm, SETTINGS)
            seam = partial(hyper_post_pre, output, streams, mix, weights, norm, SETTINGS)
            plain.append(seam)
            quantised.append(partial(seam, quantize=True))
            whole = Mix(torch.rand(rows, 4, device="cuda"), torch.rand(rows, 4, 4, device="cuda").softmax(-1))
            triton.append(partial(hyper_post_pre_triton, output, streams, whole, weights, norm, SETTINGS))
        num_bytes = rows * HIDDEN * 2 * (4 + 4 + 1 + 1) + weights.fn.numel() * 4
        for name, calls, extra in (("", plain, 0), (" + quant", quantised, 1 + 4 / 128), (", Triton", triton, 0)):
            us, how = _measure(calls, rows)
            total = num_bytes + rows * HIDDEN * extra
            table.add(f"mHC post+pre+norm{name}", f"T={rows}", us, total, peer=None if extra else peer, how=how)


def run_wide(table: Table, quick: bool = False) -> None:
    """The products as this machine runs them, and the library's."""
    for name, (outputs, peers) in PRODUCTS.items():
        head = outputs > 10_000
        count = 1 if head else 6
        weights = [torch.randn(outputs, HIDDEN, device="cuda").bfloat16() for _ in range(count)]
        for rows, peer in zip(ROWS, peers, strict=True):
            if head and rows > 512:
                continue  # a chunk has one row of logits
            x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
            num_bytes = 2 * outputs * HIDDEN + rows * (2 * HIDDEN + 4 * outputs)
            flop = 2.0 * rows * outputs * HIDDEN
            ours: list[Call] = [partial(wide_linear, x, weight) for weight in weights]
            library: list[Call] = [partial(torch.mm, x, weight.t(), out_dtype=torch.float32) for weight in weights]
            for how_made, calls in (("", ours), (", cuBLAS", library)):
                us, how = _measure(calls, rows)
                table.add(f"{name}{how_made}", f"T={rows}", us, num_bytes, flop, peer=peer, how=how)
