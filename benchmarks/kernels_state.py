"""The ops that make and read state, at Flash's size: attention inputs, compressors, indexer.

Decoding, every request has about 8K context; prefill is one chunk of 16,384 tokens from position 0."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels_timing import Call, Table, graph_us, isolated_us
from kernels.attention_inputs import attention_inputs
from kernels.batch_index import BatchIndex
from kernels.compressor import EntryTarget, compress_overlapping, compress_pending
from kernels.gpu_indexer import index_scores_hopper, top_entries_hopper, top_fits_hopper
from kernels.indexer import PackedQuery, index_query
from kernels.packed_rows import PackedRows, PoolFormat
from kernels.rope import rope_angles
from kernels.triton_index_scores import index_scores
from kernels.triton_top_entries import top_entries

HEADS, WIDTH, INDEX_HEADS, INDEX_WIDTH, WINDOW, TOPK = 64, 512, 64, 128, 128, 512
CONTEXT, PAGE_TOKENS, CHUNK = 8192, 256, 16384
BATCHES = (64, 256, 512, CHUNK)
INPUT_PEERS = {64: 5.3, 256: 16.6, 512: 32.1, CHUNK: 566.0}
SCORE_PEERS = {64: 5.7, 256: 22.6, 512: 40.4, CHUNK: 605.0}
TOP_PEERS = {64: 2.9, 256: 3.8, 512: 7.4, CHUNK: 189.0}


def _pool(pages: int, rows: int, width: int, form: PoolFormat) -> PackedRows:
    """Rows of random finite values."""
    data_bytes, scale_bytes = {"kv_fp8": (576, 8), "key_mxfp4": (64, 4), "key_fp8": (128, 4)}[form]
    data = torch.randint(0, 256, (pages, rows, data_bytes), dtype=torch.uint8, device="cuda") & 0xB7
    scales = torch.randint(118, 124, (pages, rows, scale_bytes), dtype=torch.uint8, device="cuda")
    if form == "key_fp8":
        scales = torch.ones(pages, rows, 1, device="cuda")
    return PackedRows(format=form, width=width, rope_dim=64 if form == "kv_fp8" else 0, data=data, scales=scales)


def _index(batch: int) -> BatchIndex:
    """Decode positions differ, so that a quarter of the tokens closes a block of four."""
    decode = batch < CHUNK
    requests, count = (batch, 1) if decode else (1, batch)
    context = torch.zeros(1, device="cuda").int()
    if decode:
        context = CONTEXT - 1 - torch.arange(requests, device="cuda").int() % PAGE_TOKENS
    pages = (CONTEXT if decode else CHUNK) // PAGE_TOKENS
    return BatchIndex(
        token_request_T=torch.arange(requests, device="cuda").repeat_interleave(count).int(),
        positions_T=context.long() if decode else torch.arange(count, device="cuda"),
        query_start=torch.arange(requests + 1, device="cuda").int() * count,
        context_len_B=context,
        slot_ids_B=torch.randperm(requests, device="cuda").int(),
        page_table=torch.randperm(requests * pages, device="cuda").int().view(requests, pages),
        page_tokens=PAGE_TOKENS,
        one_token_each=decode,
    )


class _Rows:
    """Adds measured lines of one batch size."""

    def __init__(self, table: Table, batch: int) -> None:
        self._table, self._batch, self._decode = table, batch, batch < CHUNK

    def add(
        self, name: str, call: Call, num_bytes: float, flop: float = 0.0, unit: str = "bf16", peer: float | None = None
    ) -> None:
        us = graph_us([call]) if self._decode else isolated_us(call, 7)
        shape, how = f"{'B' if self._decode else 'T'}={self._batch}", "graph" if self._decode else "isolated"
        self._table.add(name, shape, us, num_bytes, flop, unit, peer, how)


def run(table: Table, quick: bool = False) -> None:
    for batch in BATCHES:
        rows, index = _Rows(table, batch), _index(batch)
        frequencies = torch.logspace(0, -4, 32, device="cuda")
        angles = rope_angles(index.positions_T, frequencies)
        _inputs(rows, index, angles)
        _compressors(rows, index, frequencies)
        _indexer(rows, index, angles, ("key_mxfp4",) if quick else ("key_mxfp4", "key_fp8"))
        torch.cuda.empty_cache()


def _inputs(rows: _Rows, index: BatchIndex, angles: tuple[Tensor, Tensor]) -> None:
    tokens = index.num_tokens
    query = torch.randn(tokens, HEADS, WIDTH, device="cuda").bfloat16()
    row, norm = torch.randn(tokens, WIDTH, device="cuda").bfloat16(), torch.rand(WIDTH, device="cuda")
    ring = _pool(index.num_requests, WINDOW, WIDTH, "kv_fp8")
    call = partial(attention_inputs, query, row, norm, angles, 1e-6, ring, index, simulate=True)
    moved = 4 * HEADS * WIDTH + 2 * WIDTH + 584 * (1 + index.one_token_each)
    rows.add("q norm + RoPE, KV norm + RoPE + insert", call, moved * tokens, peer=INPUT_PEERS[tokens])


def _compressors(rows: _Rows, index: BatchIndex, frequencies: Tensor) -> None:
    tokens, slots, pages = index.num_tokens, index.num_requests, index.page_table.numel()
    for name, width, form in (("CSA", WIDTH, "kv_fp8"), ("indexer", INDEX_WIDTH, "key_mxfp4")):
        value, score = torch.randn(tokens, 4 * width, device="cuda").split(2 * width, -1)
        ape = torch.randn(4, 2 * width, device="cuda")
        partial_rows = torch.randn(slots, 4, 2, 2 * width, device="cuda")
        overlap = torch.randn(slots, 4, 2, width, device="cuda")
        pool = _pool(pages, PAGE_TOKENS // 4, width, form)  # type: ignore[arg-type]
        target = EntryTarget(torch.rand(width, device="cuda"), frequencies, pool, 1e-6, True)
        call = partial(compress_overlapping, value, score, ape, partial_rows, overlap, index, target, torch.bfloat16)
        # New rows once; decoding, three of four tokens write them, the fourth reads three and replaces the overlap.
        moved = 16 * width * (2.5 if index.one_token_each else 1.0) + (8 * width if index.one_token_each else 0)
        rows.add(f"compress {name}, {form}", call, tokens * (moved + 146))
    value, score = torch.randn(tokens, 2 * WIDTH, device="cuda").split(WIDTH, -1)
    pending = torch.randn(slots, 3, WIDTH, device="cuda")
    target = EntryTarget(torch.rand(WIDTH, device="cuda"), frequencies, _pool(pages, 2, WIDTH, "kv_fp8"), 1e-6, True)
    ape = torch.randn(128, WIDTH, device="cuda")
    call = partial(compress_pending, value, score, ape, pending, index, target, torch.bfloat16)
    rows.add("compress HCA, kv_fp8", call, tokens * WIDTH * (8 + (24 if index.one_token_each else 0)))


def _indexer(rows: _Rows, index: BatchIndex, angles: tuple[Tensor, Tensor], formats: tuple[PoolFormat, ...]) -> None:
    tokens, most = index.num_tokens, index.page_table.shape[1] * PAGE_TOKENS // 4
    visible = float(((index.positions_T + 1) // 4).sum())
    raw = torch.randn(tokens, INDEX_HEADS, INDEX_WIDTH, device="cuda").bfloat16()
    weights = torch.randn(tokens, INDEX_HEADS, device="cuda")
    scores = torch.randn(tokens, most, device="cuda")
    for form in formats:
        keys = _pool(index.page_table.numel(), PAGE_TOKENS // 4, INDEX_WIDTH, form)
        query = index_query(raw.clone(), angles, keys, simulate=True)
        packed = isinstance(query, PackedQuery)
        query_bytes = raw.numel() * (1 if packed else 2)
        rows.add(
            f"index query, {form}",
            partial(index_query, raw, angles, keys, simulate=True),
            2.0 * raw.numel() + query_bytes,
        )
        compute = index_scores_hopper if packed else index_scores
        call = partial(compute, query, weights, keys, index, 4, TOPK, scores, 0)  # type: ignore[arg-type]
        record = 68 if form == "key_mxfp4" else 132
        read = record * (visible if index.one_token_each else most) + query_bytes
        flop = 2.0 * visible * INDEX_HEADS * INDEX_WIDTH
        unit = "fp8" if packed or form == "key_fp8" else "bf16"
        rows.add(f"index scores, {form}", call, read + 4 * visible, flop, unit, SCORE_PEERS[tokens])
    chosen = torch.empty(tokens, TOPK, dtype=torch.int32, device="cuda")
    choose = top_entries_hopper if top_fits_hopper(scores, TOPK) else top_entries
    call = partial(choose, scores, index.positions_T, 4, TOPK, chosen)
    rows.add(f"top-{TOPK} of {most}", call, 4 * (visible + TOPK * tokens), peer=TOP_PEERS[tokens])
