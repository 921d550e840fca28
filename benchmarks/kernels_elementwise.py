"""Elementwise passes at Flash's size."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernels_timing import Call, Table, graph_us, isolated_us
from kernels.sampling import Truncation, draw, draw_ref
from kernels.triton_gate import pick_experts
from kernels.triton_rotary import inverse_rope_quantize, rotate_in_place

HEADS, WIDTH, HALF, EXPERTS, VOCABULARY = 64, 512, 32, 256, 129_280
GATE_PEERS = {64: 4.2, 256: 4.3, 512: 4.4, 16384: 31.8}
PEERS = {64: 5.4, 256: 20.7, 512: 40.4, 16384: 1266}


def run(table: Table, quick: bool = False) -> None:
    for rows, inverse_peer in PEERS.items():
        decode = rows <= 512
        how, sets = ("graph", max(1, 2048 // rows)) if decode else ("isolated", 1)
        cos, sin = (torch.randn(rows, HALF, device="cuda") for _ in range(2))
        heads = [torch.randn(rows, HEADS, WIDTH, device="cuda").bfloat16() for _ in range(sets)]
        turns: list[Call] = [partial(rotate_in_place, x, cos, sin, inverse=True) for x in heads]
        inverses: list[Call] = [partial(inverse_rope_quantize, x, cos, sin) for x in heads]
        for name, calls, num_bytes, peer in (
            ("inverse RoPE", turns, 4.0 * 2 * HALF / WIDTH, None),
            ("inverse RoPE + quant", inverses, 3.0 + 4 / 128, inverse_peer),
        ):
            us = graph_us(calls, 2 * sets) if decode else isolated_us(calls[0])
            table.add(name, f"T={rows}", us, num_bytes * rows * HEADS * WIDTH, peer=peer, how=how)
        logits, bias = torch.randn(rows, EXPERTS, device="cuda"), torch.randn(EXPERTS, device="cuda")
        call: Call = partial(pick_experts, logits, 6, 1.5, bias_E=bias)
        us = graph_us([call]) if decode else isolated_us(call)
        table.add("gate top-6", f"T={rows}", us, 4.0 * logits.numel() + 72 * rows, peer=GATE_PEERS[rows], how=how)
        if decode:
            _sampling(table, rows)


def _sampling(table: Table, rows: int) -> None:
    """Every row drawn; the bound is one read of the logits, the peer column holds torch's sort and prefix sum."""
    logits = 3 * torch.randn(rows, VOCABULARY, device="cuda")
    best, every = logits.amax(-1), torch.arange(rows, device="cuda")
    half = torch.full((rows,), 0.5, dtype=torch.float64, device="cuda")
    nucleus = Truncation(every, torch.full_like(every, VOCABULARY), torch.full_like(half, 0.95), VOCABULARY)
    for name, truncation in (("draw", None), ("draw, top-p 0.95", nucleus)):
        inputs = (logits, best, every, half.float(), half, None, truncation)
        peer = isolated_us(partial(draw_ref, *inputs), 3)
        table.add(name, f"B={rows}", graph_us([partial(draw, *inputs)], 2), 4.0 * logits.numel(), peer=round(peer, 1))
