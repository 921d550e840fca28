"""Twins of the ops that read and write pages and slots, against definitions that hold a request's whole history."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.batch_index import BatchIndex, ranges
from kernels.compressor import EntryTarget, compress_overlapping, compress_pending
from kernels.dispatch import forced_triton, use_triton
from kernels.indexer import all_entries, select_entries, top_entries_ref
from kernels.packed_rows import PackedRows, read_rows, store_rows, write_rows
from kernels.rms_norm import rms_norm_ref
from kernels.rope import rope_angles, rope_ref
from kernels.sparse_attention import sparse_attention
from kernels.window_ring import insert_window

PAGE_TOKENS = 32
FREQUENCIES = torch.tensor([1.0, 0.3, 0.05, 0.001])
# Chunk sizes of three requests, step by step: blocks begin, continue and close in every way; some have no tokens.
STEPS = [(1, 5, 0), (2, 3, 1), (1, 0, 30), (9, 8, 1), (1, 1, 1), (1, 1, 1), (20, 1, 4), (1, 16, 1), (3, 1, 2)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches() -> list[tuple[BatchIndex, list[list[int]]]]:
    """(index, positions of each request) for every step."""
    context, found = [0, 0, 0], []
    for sizes in STEPS:
        start = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        positions = [list(range(c, c + n)) for c, n in zip(context, sizes, strict=True)]
        index = BatchIndex(
            token_request_T=torch.arange(3, dtype=torch.int32).repeat_interleave(start.diff()),
            positions_T=torch.tensor([p for request in positions for p in request], dtype=torch.int64),
            query_start=start,
            context_len_B=torch.tensor(context, dtype=torch.int32),
            slot_ids_B=torch.tensor([3, 0, 2], dtype=torch.int32),
            page_table=torch.tensor([[5, 1], [0, 7], [2, 6]], dtype=torch.int32),
            page_tokens=PAGE_TOKENS,
        )
        found.append((index, positions))
        context = [c + n for c, n in zip(context, sizes, strict=True)]
    return found


def plain_pool(pages: int, rows: int, width: int, rope_dim: int) -> PackedRows:
    return PackedRows(format="f32", width=width, rope_dim=rope_dim, data=torch.full((pages, rows, width), math.nan))


def read_entries(pool: PackedRows, index: BatchIndex, request: int, count: int, ratio: int) -> Tensor:
    entry = torch.arange(count)
    page, row = index.entry_location(torch.full((count,), request), entry, ratio)
    return read_rows(pool, page, row, torch.float32)


def finished(pooled: Tensor, norm: Tensor, ratio: int) -> Tensor:
    positions = torch.arange(pooled.shape[0]) * ratio
    return rope_ref(rms_norm_ref(pooled, norm, 1e-6), *rope_angles(positions, FREQUENCIES))


def test_overlapping_compressor_equals_the_definition_over_the_whole_history() -> None:
    dim, ratio = 16, 4
    value, score = randn(3, 64, 2 * dim), randn(3, 64, 2 * dim, seed=1)
    ape, norm = randn(ratio, 2 * dim, seed=2), randn(dim, seed=3)
    pool = plain_pool(8, PAGE_TOKENS // ratio, dim, 8)
    partial, overlap = torch.full((4, 4, 2, 2 * dim), math.nan), torch.full((4, 4, 2, dim), math.nan)
    target = EntryTarget(norm, FREQUENCIES, pool, 1e-6, False)
    for index, positions in batches():
        rows = [torch.tensor(p, dtype=torch.int64) for p in positions]
        packed = [torch.cat([data[b, p] for b, p in enumerate(rows)]) for data in (value, score)]
        compress_overlapping(*packed, ape, partial, overlap, index, target, torch.float32)
        for request, end in enumerate(index.end_len_B.tolist()):
            blocks = end // ratio
            v = value[request, : blocks * ratio].unflatten(0, (blocks, ratio))
            s = score[request, : blocks * ratio].unflatten(0, (blocks, ratio)) + ape
            wanted = torch.zeros(blocks, dim)
            for j in range(blocks):
                values, scores = [v[j, :, dim:]], [s[j, :, dim:]]
                if j:
                    values.insert(0, v[j - 1, :, :dim])
                    scores.insert(0, s[j - 1, :, :dim])
                wanted[j] = (torch.cat(scores).softmax(0) * torch.cat(values)).sum(0)
            got = read_entries(pool, index, request, blocks, ratio)
            assert torch.allclose(got, finished(wanted, norm, ratio), atol=1e-5)


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_pending_compressor_equals_the_definition_over_the_whole_history(ratio: int) -> None:
    dim = 16
    value, score = randn(3, 64, dim), 5 * randn(3, 64, dim, seed=1)
    ape, norm = randn(ratio, dim, seed=2), randn(dim, seed=3)
    pool, pending = plain_pool(8, PAGE_TOKENS // ratio, dim, 8), torch.full((4, 3, dim), math.nan)
    target = EntryTarget(norm, FREQUENCIES, pool, 1e-6, False)
    for index, positions in batches():
        rows = [torch.tensor(p, dtype=torch.int64) for p in positions]
        packed = [torch.cat([data[b, p] for b, p in enumerate(rows)]) for data in (value, score)]
        compress_pending(*packed, ape, pending, index, target, torch.float32)
        for request, end in enumerate(index.end_len_B.tolist()):
            blocks = end // ratio
            v = value[request, : blocks * ratio].unflatten(0, (blocks, ratio))
            s = score[request, : blocks * ratio].unflatten(0, (blocks, ratio)) + ape
            wanted = finished((s.softmax(1) * v).sum(1), norm, ratio)
            assert torch.allclose(read_entries(pool, index, request, blocks, ratio), wanted, atol=1e-5)


def test_a_window_ring_holds_the_last_rows_byte_for_byte() -> None:
    for window in (1, 7, 16):
        ring = PackedRows(
            format="kv_fp8", width=128, rope_dim=64,
            data=torch.full((4, window, 192), 0xFF, dtype=torch.uint8),
            scales=torch.full((4, window, 8), 0xFF, dtype=torch.uint8),
        )  # fmt: skip
        history = randn(3, 64, 128)
        for index, positions in batches():
            chunk = ring.like(index.num_tokens)
            values = torch.cat([history[b, p] for b, p in enumerate(positions)])
            write_rows(chunk, torch.zeros(len(values), dtype=torch.int64), torch.arange(len(values)), values)
            insert_window(chunk, ring, index)
            for request, end in enumerate(index.end_len_B.tolist()):
                last = torch.arange(max(0, end - window), end)
                expected = ring.like(len(last))
                row = torch.arange(len(last))
                write_rows(expected, torch.zeros_like(row), row, history[request, last])
                slot = index.slot_ids_B[request].expand(len(last))
                assert torch.equal(ring.data[slot, last % window], expected.data[0])
                assert expected.scales is not None
                assert ring.scales is not None
                assert torch.equal(ring.scales[slot, last % window], expected.scales[0])
        assert bool((ring.data[1] == 0xFF).all())


@pytest.mark.parametrize("ratio", [0, 4, 16])
def test_sparse_attention_equals_dense_attention_over_the_listed_keys(ratio: int) -> None:
    heads, dim, window = 4, 32, 7
    history, compressed, sink = randn(3, 64, dim), randn(3, 16, dim, seed=1), randn(heads, seed=2)
    ring = plain_pool(4, window, dim, 8)
    entries = plain_pool(8, PAGE_TOKENS // (ratio or PAGE_TOKENS), dim, 8)
    for number, (index, positions) in enumerate(batches()):
        total = index.num_tokens
        every = torch.arange(total)
        chunk = ring.like(total)
        write_rows(chunk, torch.zeros_like(every), every, torch.cat([history[b, p] for b, p in enumerate(positions)]))
        selected = None
        if ratio:
            first = index.context_len_B // ratio
            request, entry = ranges(first, index.end_len_B // ratio - first)
            page, row = index.entry_location(request, entry, ratio)
            write_rows(entries, page, row, compressed[request, entry])
            selected = all_entries(index, ratio)
            if selected.shape[1] > 2:  # drop some, shuffle the rest: neither order nor gaps matter
                order = torch.randperm(selected.shape[1], generator=torch.Generator().manual_seed(number))
                selected = selected[:, order].masked_fill(order == 1, -1)
        query = randn(total, heads, dim, seed=number)
        listed = entries if ratio else None
        got = sparse_attention(query, chunk, ring, sink, index, dim**-0.5, listed, selected, ratio)
        insert_window(chunk, ring, index)
        row = 0
        for request, here in enumerate(positions):
            for position in here:
                keys = history[request, max(0, position - window + 1) : position + 1]
                if selected is not None:
                    keys = torch.cat((keys, compressed[request, [e for e in selected[row].tolist() if e >= 0]]))
                logits = torch.cat((query[row] @ keys.T * dim**-0.5, sink[:, None]), 1)
                wanted = logits.softmax(-1)[:, :-1] @ keys
                assert torch.allclose(got[row], wanted, atol=1e-5)
                row += 1


def test_attention_in_pieces_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = batches()[6]
    ring = plain_pool(4, 7, 32, 8)
    ring.data.normal_()
    chunk = ring.like(index.num_tokens)
    chunk.data.normal_()
    query, sink = randn(index.num_tokens, 4, 32), randn(4)
    whole = sparse_attention(query, chunk, ring, sink, index, 0.2)
    monkeypatch.setattr("kernels.sparse_attention.MAX_GATHERED", 16 * 32 * 3)
    assert torch.equal(sparse_attention(query, chunk, ring, sink, index, 0.2), whole)


def test_selection_takes_the_best_entries_and_the_lowest_of_equals() -> None:
    scores = torch.tensor([[0.0, 3.0, 0.0, 0.0, 3.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert top_entries_ref(scores, torch.tensor([5, 6]), 3).tolist() == [[1, 4, 0], [0, 1, 2]]


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_indexer_selects_per_token_among_the_blocks_it_may_see(format: str) -> None:
    heads, dim, ratio, topk = 3, 32, 4, 3
    keys = randn(3, 16, dim)
    dtype = torch.float32 if format == "f32" else torch.bfloat16
    pool = PackedRows(
        format=format, width=dim, rope_dim=0, data=torch.full((8, PAGE_TOKENS // ratio, dim), math.nan, dtype=dtype)
    )
    for number, (index, positions) in enumerate(batches()):
        first = index.context_len_B // ratio
        request, entry = ranges(first, index.end_len_B // ratio - first)
        page, row = index.entry_location(request, entry, ratio)
        store_rows(pool, page, row, keys[request, entry], simulate=False)
        query, weights = (
            randn(index.num_tokens, heads, dim, seed=number),
            randn(index.num_tokens, heads, seed=50 + number),
        )
        selected = select_entries(query, weights, pool, index, ratio, topk)
        row = 0
        for request, here in enumerate(positions):
            for position in here:
                visible = (position + 1) // ratio
                scores = (
                    (query[row] @ keys[request, :visible].to(dtype).float().T).relu().mul(weights[row][:, None]).sum(0)
                )
                wanted = scores.topk(min(topk, visible)).indices.tolist()
                assert sorted(e for e in selected[row].tolist() if e >= 0) == sorted(wanted)
                row += 1


def test_scoring_in_pieces_selects_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = batches()[6]
    pool = plain_pool(8, PAGE_TOKENS // 4, 32, 0)
    pool.data.copy_(randn(*pool.data.shape))
    query, weights = randn(index.num_tokens, 3, 32), randn(index.num_tokens, 3, seed=1)
    whole = select_entries(query, weights, pool, index, 4, 2)
    monkeypatch.setattr("kernels.indexer.MAX_LOGITS", 50)
    assert torch.equal(select_entries(query, weights, pool, index, 4, 2), whole)


def test_ranges_of_no_requests_and_of_empty_ones() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert [part.tolist() for part in ranges(none, none)] == [[], []]
    owner, value = ranges(torch.tensor([5, 9, 2]), torch.tensor([2, 0, 3]))
    assert owner.tolist() == [0, 0, 2, 2, 2]
    assert value.tolist() == [5, 6, 2, 3, 4]


def test_triton_is_forced_on_the_cpu_only_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not use_triton(x)
    with forced_triton():
        assert use_triton(x)
    assert not use_triton(x)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), forced_triton():
        pass
