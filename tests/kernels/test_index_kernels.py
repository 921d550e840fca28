"""The indexer's kernels: queries, scores over pages, and the best entries, against the twins."""

from __future__ import annotations

import pytest
import torch

from kernels import gpu_indexer
from kernels.gpu_indexer import select_entries_gpu
from kernels.indexer import all_entries, index_query_ref, index_scores_ref, select_entries_ref, top_entries_ref
from kernels.packed_rows import read_rows_ref, write_rows_ref
from kernels.rope import rope_angles
from kernels.triton_index_query import fits, index_query_triton
from kernels.triton_index_scores import index_scores
from kernels.triton_top_entries import top_entries
from tests.kernels.state_batches import KEY_FORMATS, PAGE_TOKENS, batch, moved, pool, pool_copy

RATIO = 4
PACKED_FORMATS = [form for form in KEY_FORMATS if form != "f32"]
MIXED = [(40, 3), (0, 2), (3, 0), (90, 4), (17, 1)]
DECODE = [(99, 1), (0, 1), (64, 1)]


def _randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("simulate", [True, False])
@pytest.mark.parametrize("form", PACKED_FORMATS)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(0, 4, 128), (3, 5, 128), (2, 64, 32)])
def test_queries_are_rotated_transformed_and_rounded_like_keys(device, tokens, heads, width, form, simulate):
    query = _randn(tokens, heads, width, seed=heads).bfloat16()
    angles = rope_angles(torch.arange(tokens) * 77, 10000.0 ** -(torch.arange(16) / 16))
    keys = pool(1, 1, width, form, 0)
    on_device = (angles[0].to(device), angles[1].to(device))
    got = index_query_triton(query.clone().to(device), on_device, keys, simulate=simulate).cpu()
    expected = index_query_ref(query.clone(), angles, keys, simulate=simulate)
    assert got.shape == expected.shape
    if tokens:
        largest = expected.float().abs().amax(-1, keepdim=True)
        step = {"key_mxfp4": 0.4, "bf16": 0.4, "key_fp8": 0.08}[form] if simulate else 0.01
        assert bool(((got.float() - expected.float()).abs() <= step * largest).all())
        assert float((got == expected).float().mean()) > 0.97


def _keys(index, form, width, seed=3):
    """A pool with the history of every request, poison elsewhere."""
    keys = pool(
        int(index.page_table.max()) + 2 if index.page_table.numel() else 1, PAGE_TOKENS // RATIO, width, form, 0
    )
    for request, end in enumerate(index.end_len_B.tolist()):
        entry = torch.arange(end // RATIO)
        page, row = index.entry_location(torch.full_like(entry, request), entry, RATIO)
        write_rows_ref(keys, page.long(), row.long(), _randn(len(entry), width, seed=seed + request).bfloat16())
    return keys


def _queries(index, heads, width, form):
    """Queries on the keys' grid, as select_entries takes them; head weights of both signs."""
    query = _randn(index.num_tokens, heads, width, seed=heads).bfloat16()
    angles = (torch.ones(index.num_tokens, 16), torch.zeros(index.num_tokens, 16))
    query = index_query_ref(query, angles, pool(1, 1, width, form, 0), simulate=form != "bf16")
    return query, _randn(index.num_tokens, heads, seed=5)


def _scores_of(index, query, weights, keys, token):
    """float32 [visible] of one token."""
    entry = torch.arange((int(index.positions_T[token]) + 1) // RATIO)
    page, row = index.entry_location(index.token_request_T[token].long().expand_as(entry), entry, RATIO)
    rows = read_rows_ref(keys, page.long(), row.long(), torch.float32)
    return index_scores_ref(query[token : token + 1].float(), rows, weights[token : token + 1])[0]


@pytest.mark.parametrize("form", PACKED_FORMATS)
@pytest.mark.parametrize(("requests", "heads"), [(MIXED, 4), (MIXED, 24), (DECODE, 64)])
def test_scores_match_and_nothing_else_is_written(device, requests, heads, form):
    width, topk, first = 128, 4, 1
    index = batch(requests)
    keys, (query, weights) = _keys(index, form, width), _queries(index, heads, width, form)
    most = index.page_table.shape[1] * PAGE_TOKENS // RATIO
    scores = torch.full((index.num_tokens - first, most + 3), torch.nan, device=device)[:, :most]
    index_scores(
        query.to(device), weights.to(device), pool_copy(keys, device), moved(index, device), RATIO, topk, scores, first
    )
    got = scores.cpu()
    for line, token in zip(got, range(first, index.num_tokens), strict=True):
        visible = (int(index.positions_T[token]) + 1) // RATIO
        visible = visible if visible > topk else 0
        assert bool(line[visible:].isnan().all())
        if visible:
            expected = _scores_of(index, query, weights, keys, token)
            scale = float((query[token].float().norm(dim=-1) * weights[token].abs()).sum()) * width**0.5
            # FP8 tensor cores keep about 14 bits of a sum's largest term.
            torch.testing.assert_close(
                line[:visible], expected, rtol=0, atol=scale * (2e-4 if form == "key_fp8" else 2e-6)
            )


def _expected_top(scores, seen, topk):
    """The best in ascending order, then -1."""
    lines = []
    for line, count in zip(scores, seen.tolist(), strict=True):
        if count > topk:
            chosen = top_entries_ref(line[None, :count], torch.tensor([count]), topk)[0].sort().values.tolist()
        else:
            chosen = [*range(count), *[-1] * (topk - count)]
        lines.append(chosen)
    return torch.tensor(lines, dtype=torch.int32).view(len(lines), topk)


@pytest.mark.parametrize("segment", [64, 16], ids=["whole", "segments"])
@pytest.mark.parametrize("topk", [1, 5, 8])
def test_the_best_entries_are_chosen_and_the_lowest_of_equals(device, topk, segment):
    seen = torch.tensor([0, 1, 4, 5, 6, 8, 9, 16, 17, 33, 50])
    scores = _randn(len(seen), 50, seed=topk)
    scores[6] = 0.0
    scores[7, ::2], scores[7, 1::2] = 0.0, -0.0
    scores[8] = scores[8].round()
    scores[9, 30:] = float("inf")
    scores[10] = float("-inf")
    expected = _expected_top(scores, seen, topk)
    poisoned = scores.where(torch.arange(50) < seen[:, None], torch.nan).where((seen > topk)[:, None], torch.nan)
    got = torch.full((len(seen), topk), 77, dtype=torch.int32, device=device)
    top_entries(poisoned.to(device), (seen * RATIO - 1 + seen % 3).to(device), RATIO, topk, got, segment)
    assert torch.equal(got.cpu(), expected)


def test_no_tokens_choose_nothing(device):
    empty = torch.empty(0, 3, dtype=torch.int32, device=device)
    top_entries(torch.empty(0, 9, device=device), torch.empty(0, dtype=torch.int64, device=device), 4, 3, empty)
    index = moved(batch([(30, 0)]), device)
    query, weights = torch.empty(0, 4, 128, device=device).bfloat16(), torch.empty(0, 4, device=device)
    keys = pool_copy(pool(2, 8, 128, "bf16", 0), device)
    assert select_entries_gpu(query, weights, keys, index, RATIO, 3).shape == (0, 3)


def _check_selection(device, index, form, heads, width, topk):
    keys, (query, weights) = _keys(index, form, width), _queries(index, heads, width, form)
    got = select_entries_gpu(
        query.to(device), weights.to(device), pool_copy(keys, device), moved(index, device), RATIO, topk
    ).cpu()
    expected = select_entries_ref(query.clone(), weights, keys, index, RATIO, topk)
    for token in range(index.num_tokens):
        mine = [entry for entry in got[token].tolist() if entry >= 0]
        wanted = {entry for entry in expected[token].tolist() if entry >= 0}
        assert mine == sorted(set(mine))
        assert len(mine) == len(wanted)
        if set(mine) != wanted:  # entries whose scores differ by the rounding of the sums
            scores = _scores_of(index, query, weights, keys, token)
            level = scores[list(wanted)].min()
            odd = list(set(mine) ^ wanted)
            assert bool(((scores[odd] - level).abs() < 1e-3 * scores.abs().max()).all())


@pytest.mark.parametrize("form", PACKED_FORMATS)
@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
def test_selection_agrees_with_the_twin(device, requests, form):
    _check_selection(device, batch(requests), form, heads=16, width=128, topk=9)


def test_selection_in_pieces_is_the_same(device, monkeypatch):
    index = batch(MIXED)
    keys, (query, weights) = _keys(index, "key_mxfp4", 128), _queries(index, 4, 128, "key_mxfp4")
    inputs = (query.to(device), weights.to(device), pool_copy(keys, device), moved(index, device), RATIO, 5)
    whole = select_entries_gpu(*inputs)
    monkeypatch.setattr(gpu_indexer, "MAX_SCORES", 3 * index.page_table.shape[1] * PAGE_TOKENS // RATIO)
    assert torch.equal(select_entries_gpu(*inputs), whole)


def test_short_histories_need_no_scores(device):
    index = moved(batch([(20, 2), (0, 1)]), device)
    query, weights = torch.full((3, 4, 128), torch.nan, device=device).bfloat16(), torch.ones(3, 4, device=device)
    keys = pool_copy(pool(4, 8, 128, "bf16", 0), device)
    selected = select_entries_gpu(query, weights, keys, index, RATIO, 30)
    assert [[entry for entry in line if entry >= 0] for line in selected.tolist()] == [[*range(5)], [*range(5)], []]
    assert torch.equal(selected[:, :5], all_entries(index, RATIO)[:, :5])


def test_float32_queries_are_left_to_the_twin():
    assert not fits(torch.zeros(1, 1, 128), pool(1, 1, 128, "bf16", 0))
    assert not fits(torch.zeros(1, 1, 128).bfloat16(), pool(1, 1, 128, "f32", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("form", PACKED_FORMATS)
@pytest.mark.parametrize(
    "requests",
    [[(8191, 1), (0, 1), (2050, 1), (33000, 1), (5000, 1)], [(9000, 65), (0, 3), (2040, 30)]],
    ids=["decode", "chunk"],
)
def test_selection_agrees_at_the_released_size(device, requests, form):
    _check_selection(device, batch(requests), form, heads=64, width=128, topk=512)


@pytest.mark.gpu
def test_top_entries_of_long_rows(device):
    seen = torch.tensor([600, 2048, 2049, 8192, 8193, 100_000, 262_144])
    scores = _randn(len(seen), 262_144).round(decimals=3)
    got = torch.empty(len(seen), 512, dtype=torch.int32, device=device)
    top_entries(scores.to(device), (seen * RATIO - 1).to(device), RATIO, 512, got)
    assert torch.equal(got.cpu(), _expected_top(scores, seen, 512))
