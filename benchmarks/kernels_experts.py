"""Routed experts of one EP4 rank at Flash's size: 64 of 256 experts, six a token, tokens of four ranks."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernels_timing import Call, Table, graph_us, isolated_us
from kernels.gpu_experts import (
    BLOCK_ROWS,
    PackedBank,
    block_rows_for,
    pack_bank,
    packed_down,
    packed_up,
    routed_experts_gpu,
)
from kernels.moe import ExpertWeights
from kernels.triton_expert_rows import combine_rows, quantize_rows, sort_by_expert
from kernels.triton_experts import experts_down, experts_up

HIDDEN, WIDTH, LOCAL, TOTAL, TOPK, RANKS = 4096, 2048, 64, 256, 6, 4
PEER = {64: 232, 256: 305, 512: 397, 16384: 5400}


def make_weights() -> ExpertWeights:
    """Random codes and scales of a trained checkpoint's size."""

    def codes(rows: int, channels: int) -> torch.Tensor:
        return torch.randint(0, 256, (LOCAL, rows, channels // 2), dtype=torch.uint8, device="cuda")

    def scales(rows: int, channels: int) -> torch.Tensor:
        return torch.randint(117, 122, (LOCAL, rows, channels // 32), dtype=torch.uint8, device="cuda")

    return ExpertWeights(
        0, codes(2 * WIDTH, HIDDEN), codes(HIDDEN, WIDTH), scales(2 * WIDTH, HIDDEN), scales(HIDDEN, WIDTH)
    )


def run(table: Table, quick: bool = False) -> None:
    weights = make_weights()
    bank = pack_bank(weights)
    for batch in (64, 256, 512, 4096, 8192, 16384):  # of prompts, also the parts in which an exchange may bring 16,384
        _run_batch(table, weights, bank, batch, quick)


def _run_batch(table: Table, weights: ExpertWeights, bank: PackedBank, batch: int, quick: bool) -> None:
    tokens, decode = RANKS * batch, batch <= 512
    how = "graph" if decode else "isolated"

    def measure(call: Call) -> float:
        return graph_us([call], 4) if decode else isolated_us(call, 7)

    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    experts = torch.rand(tokens, TOTAL, device="cuda").topk(TOPK).indices
    route = torch.rand(tokens, TOPK, device="cuda") + 0.1
    # A rank receives the tokens that chose one of its experts, and those alone.
    mine = (experts < LOCAL).any(1)
    x, experts, route = x[mine].contiguous(), experts[mine].contiguous(), route[mine].contiguous()
    rows = sort_by_expert(experts, 0, LOCAL)
    inputs, route_weight = quantize_rows(x, route, rows)
    offsets, count = rows.offsets_E, int(rows.offsets_E[-1])
    up_bytes = bank.up.data.numel() + count * (HIDDEN + WIDTH)
    down_bytes = bank.down.data.numel() + count * (WIDTH + 2 * HIDDEN)
    up_flop, down_flop = 2.0 * count * HIDDEN * 2 * WIDTH, 2.0 * count * HIDDEN * WIDTH
    chosen = block_rows_for(tokens, TOPK, TOTAL)
    hidden = packed_up(inputs, bank.up, offsets, route_weight, 10.0, chosen)
    y = packed_down(hidden, bank.down, offsets, chosen)

    for size in [s for s in BLOCK_ROWS if chosen / 2 <= s <= chosen * 1.6] if decode else [chosen]:
        shape = f"B={batch}, {count} rows, block {size}"
        us = measure(partial(packed_up, inputs, bank.up, offsets, route_weight, 10.0, size))
        table.add("experts up, CUDA", shape, us, up_bytes, up_flop, "fp8", how=how)
        us = measure(partial(packed_down, hidden, bank.down, offsets, size))
        table.add("experts down, CUDA", shape, us, down_bytes, down_flop, "fp8", how=how)
    shape = f"B={batch}"
    us = measure(partial(sort_by_expert, experts, 0, LOCAL))
    table.add("experts: sort", shape, us, 12.0 * experts.numel(), how=how)
    us = measure(partial(quantize_rows, x, route, rows))
    table.add("experts: quantise, copy", shape, us, 2.0 * x.numel() + count * HIDDEN, how=how)
    us = measure(partial(combine_rows, y, rows))
    table.add("experts: combine", shape, us, 2.0 * count * HIDDEN + 4.0 * x.numel(), how=how)
    us = measure(partial(routed_experts_gpu, x, experts, route, bank, limit=10.0, block_rows=chosen))
    shape, num_bytes = f"{shape}, block {chosen}", up_bytes + down_bytes
    table.add("routed experts, all launches", shape, us, num_bytes, up_flop + down_flop, "fp8", PEER.get(batch), how)
    if decode and not quick:
        assert weights.w13_scale is not None
        assert weights.w2_scale is not None
        tile = 16 if chosen <= 16 else 32 if chosen <= 32 else 64
        shape = f"B={batch}, block {tile}"
        us = measure(partial(experts_up, inputs, weights.w13, weights.w13_scale, offsets, route_weight, 10.0, tile))
        table.add("experts up, Triton", shape, us, up_bytes, up_flop)
        us = measure(partial(experts_down, hidden, weights.w2, weights.w2_scale, offsets, tile))
        table.add("experts down, Triton", shape, us, down_bytes, down_flop)
