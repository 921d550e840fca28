"""Sparse attention at Flash's size: 64 heads of 512 channels, window 128, every request at 8K context."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.kernels_timing import Call, Table, graph_us, isolated_us
from kernels.batch_index import BatchIndex
from kernels.gpu_attention import sparse_attention_hopper
from kernels.packed_rows import PackedRows
from kernels.rope import rope_angles
from kernels.triton_sparse_attention import sparse_attention_triton

HEADS, WIDTH, WINDOW, CONTEXT, PAGE_TOKENS, ROW_BYTES = 64, 512, 128, 8192, 256, 584
KINDS = {"CSA": (4, 512), "HCA": (128, 64), "SWA": (0, 0)}
PEERS = {
    "CSA": {64: 43.5, 256: 85.9, 512: 168, 16384: 2301},
    "HCA": {64: 15.6, 256: 36.0, 512: 71.0, 16384: 1241},
    "SWA": {64: 12.8, 256: 27.1, 512: 58.0, 16384: 938},
}


def _pool(pages: int, rows: int) -> PackedRows:
    """Rows of random finite values."""
    data = torch.randint(0, 256, (pages, rows, 576), dtype=torch.uint8, device="cuda") & 0xB7
    data[..., 448:] = torch.randn(pages, rows, 64, device="cuda").bfloat16().view(torch.uint8)
    scales = torch.randint(118, 124, (pages, rows, 8), dtype=torch.uint8, device="cuda")
    return PackedRows(format="kv_fp8", width=WIDTH, rope_dim=64, data=data, scales=scales)


def run(table: Table, quick: bool = False) -> None:
    for kind, (ratio, listed) in KINDS.items():
        for batch in (64, 256, 512, 16384):
            inputs = _inputs(ratio, listed, batch)
            angles = rope_angles(inputs[4].positions_T, torch.linspace(1.0, 0.001, 32, device="cuda"))
            calls: dict[str, Call] = {
                "CUDA": partial(sparse_attention_hopper, *inputs),
                "CUDA, into e4m3": partial(sparse_attention_hopper, *(*inputs, angles)),
                "Triton": partial(sparse_attention_triton, *inputs),
            }
            torch.cuda.synchronize()
            decode = batch <= 512
            for name, call in calls.items():
                if name == "Triton" and (quick or not decode):
                    continue
                us = graph_us([call], 6) if decode else isolated_us(call, 5)
                keys = WINDOW + listed
                flop = 4.0 * batch * HEADS * WIDTH * keys
                # At prefill, rows are read once from memory; the rest of their reads hit L2.
                read = batch * keys * ROW_BYTES if decode else (batch + (CONTEXT // max(1, ratio))) * ROW_BYTES
                num_bytes = read + (3 if name.endswith("e4m3") else 4) * batch * HEADS * WIDTH
                shape = f"{'B' if decode else 'T'}={batch}, {keys} keys"
                how = "graph" if decode else "isolated"
                table.add(f"attention {kind}, {name}", shape, us, num_bytes, flop, "bf16", PEERS[kind][batch], how)
            del calls, inputs
            torch.cuda.empty_cache()


def _inputs(ratio: int, listed: int, batch: int) -> tuple[Any, ...]:
    decode = batch <= 512
    requests = batch if decode else 1
    pages = CONTEXT // PAGE_TOKENS
    generator = torch.Generator("cuda").manual_seed(0)
    one = torch.ones(requests, dtype=torch.int32, device="cuda")
    context = CONTEXT - 1 if decode else 0
    count = 1 if decode else batch
    num_pages = requests * (pages if decode else batch // PAGE_TOKENS)
    index = BatchIndex(
        token_request_T=torch.arange(requests, device="cuda").repeat_interleave(count).int(),
        positions_T=torch.arange(count, device="cuda").repeat(requests) + context,
        query_start=torch.arange(requests + 1, device="cuda").int() * count,
        context_len_B=one * context,
        slot_ids_B=torch.randperm(requests, generator=generator, device="cuda").int(),
        page_table=torch.randperm(num_pages, generator=generator, device="cuda").int().view(requests, -1),
        page_tokens=PAGE_TOKENS,
    )
    chunk, ring = _pool(1, batch), _pool(requests, WINDOW)
    query = torch.randn(batch, HEADS, WIDTH, device="cuda").bfloat16()
    sink = torch.randn(HEADS, device="cuda")
    if not ratio:
        return query, chunk, ring, sink, index, WIDTH**-0.5, None, None, 0
    per_page = PAGE_TOKENS // ratio
    entries = _pool(num_pages, per_page)
    visible = (index.positions_T + 1) // ratio
    selected = (torch.rand(batch, listed, device="cuda") * visible[:, None]).int()
    selected = torch.where(visible[:, None] > 0, selected, -1)
    return query, chunk, ring, sink, index, WIDTH**-0.5, entries, selected, ratio
