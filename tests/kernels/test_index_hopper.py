"""The indexer's Hopper kernels against the twins and against the Triton kernels' selections; on the CPU, what their
launchers decide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import gpu_indexer
from kernels.gpu_indexer import (
    fits_hopper,
    index_query_hopper,
    index_scores_hopper,
    splits_for,
    top_entries_hopper,
    top_fits_hopper,
)
from kernels.indexer import PackedQuery, index_query, index_query_ref, index_scores_ref, select_entries, top_entries_ref
from kernels.packed_rows import read_rows_ref, write_rows_ref
from kernels.quantize import decode_e4m3
from kernels.rope import rope_angles
from tests.kernels.state_batches import batch, moved, pool, pool_copy

RATIO, HEADS, WIDTH = 4, 64, 128
FORMATS = ("key_mxfp4", "key_fp8")
DECODE = [(8191, 1), (0, 1), (2050, 1), (33000, 1), (5003, 1)]
MIXED = [(900, 65), (0, 3), (240, 30), (17, 1), (16, 1), (99, 1), (4000, 9)]
WAYS = {"few": 1, "few, split": 3, "many": 0}
"""Splits to ask the scores for."""


def unpacked(query: PackedQuery) -> torch.Tensor:
    """float32 [T, H, D]: undoes the order of the operand. Chunk j of a head's row lies at j ^ (head mod 8), its word c
    holds channels 32 c + 4 j .. + 3."""
    codes = query.codes.cpu().view(-1, HEADS, 8, 4, 4)
    place = torch.arange(8) ^ (torch.arange(HEADS) % 8)[:, None]
    chunks = codes.gather(2, place[None, :, :, None, None].expand_as(codes))
    return decode_e4m3(chunks).transpose(2, 3).reshape(-1, HEADS, WIDTH) * query.scales_TH.cpu()[..., None]


def _randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _spread(shape: tuple[int, ...], seed: int, octaves: int) -> torch.Tensor:
    """Random rows whose groups of 32 channels differ by up to 2^octaves."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(0, octaves + 1, (*shape[:-1], shape[-1] // 32), generator=generator)
    return (torch.randn(shape, generator=generator) * torch.exp2(powers.float()).repeat_interleave(32, -1)).bfloat16()


def _keys(index, form, octaves):
    """The history of every request, poison elsewhere."""
    keys = pool(int(index.page_table.max()) + 2, index.page_tokens // RATIO, WIDTH, form, 0)
    for request, end in enumerate(index.end_len_B.tolist()):
        entry = torch.arange(end // RATIO)
        page, row = index.entry_location(torch.full_like(entry, request), entry, RATIO)
        write_rows_ref(keys, page.long(), row.long(), _spread((len(entry), WIDTH), request, octaves))
    return keys


@pytest.mark.parametrize(
    ("tokens", "most", "alone", "splits"),
    [
        (1, 2048, False, 32),
        (64, 2048, True, 8),
        (512, 2048, True, 1),
        (791, 64, False, 1),
        (792, 64, False, 0),
        (900, 64, True, 1),
    ],
)
def test_one_wave_of_programs_shares_the_keys_of_few_tokens(tokens, most, alone, splits):
    assert splits_for(tokens, most, 132, alone=alone) == splits


def test_cpu_tensors_and_other_sizes_do_not_fit():
    keys = pool(2, 64, WIDTH, "key_mxfp4", 0)
    assert not fits_hopper(torch.zeros(1, HEADS, WIDTH).bfloat16(), keys, 64)
    assert not top_fits_hopper(torch.zeros(1, 64), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_packed_queries_hold_the_twins_values(device, tokens, form):
    query = _spread((tokens, HEADS, WIDTH), tokens, 6)
    frequencies = 10000.0 ** -(torch.arange(32) / 32)
    angles = rope_angles(torch.arange(tokens) * 7919, frequencies)
    keys = pool_copy(pool(1, 64, WIDTH, form, 0), device)
    on_device = (angles[0].to(device), angles[1].to(device))
    apart = torch.full((tokens, HEADS + 1, WIDTH), torch.nan, dtype=torch.bfloat16, device=device)[:, 1:]
    apart.copy_(query)
    got = index_query(apart, on_device, keys, simulate=True)
    assert isinstance(got, PackedQuery)
    expected = index_query_ref(query.clone(), angles, keys, simulate=True).float()
    values = unpacked(got)
    assert values.shape == expected.shape
    if tokens:
        step = 0.4 if form == "key_mxfp4" else 0.08
        assert bool(((values - expected).abs() <= step * expected.abs().amax(-1, keepdim=True)).all())
        assert float((values == expected).float().mean()) > 0.97


def _inputs(device, requests, form, octaves, page_tokens=64):
    index = batch(requests, page_tokens=page_tokens)
    keys = _keys(index, form, octaves)
    angles = (torch.ones(index.num_tokens, 32, device=device), torch.zeros(index.num_tokens, 32, device=device))
    raw = _spread((index.num_tokens, HEADS, WIDTH), 9, octaves)
    query = index_query_hopper(raw.to(device), angles, pool_copy(keys, device))
    weights = _randn(index.num_tokens, HEADS + 3, seed=5)[:, :HEADS]
    return index, keys, query, weights


def _run_scores(device, query, weights, keys, index, topk, first, splits):
    most = index.page_table.shape[1] * index.page_tokens // RATIO
    scores = torch.full((index.num_tokens - first, most + 3), torch.nan, device=device)[:, :most]
    strided = torch.full((index.num_tokens, HEADS + 3), torch.nan, device=device)[:, :HEADS]
    strided.copy_(weights)
    there = (pool_copy(keys, device), moved(index, device))
    index_scores_hopper(query, strided, *there, RATIO, topk, scores, first, splits)
    return scores.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("octaves", [0, 5])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("requests", "page_tokens"), [(MIXED, 64), (MIXED, 256), (DECODE, 128)])
def test_scores_match_the_twin_and_have_the_same_bits_every_way(device, requests, page_tokens, form, octaves):
    topk, first = 4, 1
    index, keys, query, weights = _inputs(device, requests, form, octaves, page_tokens)
    results = {way: _run_scores(device, query, weights, keys, index, topk, first, n) for way, n in WAYS.items()}
    values = unpacked(query)
    for line, token in zip(results["few"], range(first, index.num_tokens), strict=True):
        visible = (int(index.positions_T[token]) + 1) // RATIO
        visible = visible if visible > topk else 0
        assert bool(line[visible:].isnan().all())
        if visible:
            entry = torch.arange(visible)
            page, row = index.entry_location(index.token_request_T[token].long().expand_as(entry), entry, RATIO)
            rows = read_rows_ref(keys, page.long(), row.long(), torch.float32)
            expected = index_scores_ref(values[token : token + 1], rows, weights[token : token + 1])[0]
            scale = float((values[token].norm(dim=-1) * weights[token].abs()).sum() * rows.norm(dim=-1).max())
            # FP8 tensor cores keep about 14 bits of a sum's largest term.
            torch.testing.assert_close(line[:visible], expected, rtol=0, atol=2e-4 * scale)
    for way, got in results.items():
        assert torch.equal(got.view(torch.int32), results["few"].view(torch.int32)), way


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_a_tokens_scores_do_not_depend_on_its_neighbours(device, form):
    index, keys, query, weights = _inputs(device, MIXED, form, 3)
    whole = _run_scores(device, query, weights, keys, index, 4, 0, None)
    for token in (0, 40, 64, 70, index.num_tokens - 1):
        part = slice(token, token + 1)
        alone = replace(
            index, token_request_T=index.token_request_T[part], positions_T=index.positions_T[part], _plans={}
        )
        one = PackedQuery(query.codes[part], query.scales_TH[part])
        got = _run_scores(device, one, weights[part], keys, alone, 4, 0, None)[0]
        assert torch.equal(got.view(torch.int32), whole[token].view(torch.int32))


def _row_of(kind, count, seed):
    scores = _randn(count, seed=seed)
    return {
        "plain": scores,
        "ties": (3 * scores).round(),
        "equal": torch.full_like(scores, -1.5),
        "infinite": torch.where(scores > 0.3, torch.inf, -torch.inf),
        "narrow": 5 + 1e-6 * scores,
        "zeros": torch.where(scores > 0, 0.0, -0.0),
        "two clusters": torch.where(scores > 1.2, 1e20 + 1e15 * scores, 1e-20 * scores),
        "partly NaN": torch.where(scores > 0.5, torch.nan, scores),
        "NaN": torch.full_like(scores, torch.nan),
    }[kind]


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [256, 1024])
@pytest.mark.parametrize(
    "kind", ["plain", "ties", "equal", "infinite", "narrow", "zeros", "two clusters", "partly NaN", "NaN"]
)
@pytest.mark.parametrize(("width", "topk"), [(2048, 512), (2052, 1), (30000, 512), (30000, 2047)])
def test_the_best_entries_are_exact_and_ascend(device, width, topk, kind, threads):
    seen = torch.tensor([0, 1, topk, topk + 1, topk + 2, min(width, 2048), width - 1, width]).clamp(max=width)
    scores = torch.full((len(seen), width), torch.nan)
    expected = torch.full((len(seen), topk), -1, dtype=torch.int32)
    for number, count in enumerate(seen.tolist()):
        if count > topk:
            scores[number, :count] = _row_of(kind, count, number)
            ordered = torch.where(scores[number].isnan(), -torch.inf, scores[number])  # a NaN counts as the lowest
            best = top_entries_ref(ordered[None, :count], torch.tensor([count]), topk)
            expected[number] = best.sort().values
        else:
            expected[number, :count] = torch.arange(count)
    got = torch.full((len(seen), topk), 77, dtype=torch.int32, device=device)
    positions = (seen * RATIO - 1 + seen % 4).to(device)
    top_entries_hopper(scores.to(device), positions, RATIO, topk, got, threads)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [256, 512, 1024])
@pytest.mark.parametrize("tail", ["quotients", "exponentials"])
def test_every_row_of_heavy_tailed_scores_gives_its_best_entries(device, tail, threads):
    """Most of a row shares a bin, and in some rows the threshold lies where that bin ends: 30 and 2 of a thousand."""
    rows, width, topk = 4000, 2048, 512
    one, other = (_randn(rows, width, seed=seed).to(device) for seed in (1, 2))
    scores = one / other if tail == "quotients" else (3 * one).exp()
    got = torch.full((rows + 1, topk), 77, dtype=torch.int32, device=device)
    positions = torch.full((rows,), width * RATIO - 1, device=device)
    top_entries_hopper(scores, positions, RATIO, topk, got[:rows], threads)
    expected = scores.topk(topk, sorted=False).indices.sort().values
    assert torch.equal(got[:rows].long(), expected)
    assert (got[rows] == 77).all()


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_selection_runs_these_kernels_and_pieces_change_nothing(device, form, monkeypatch):
    index, keys, query, weights = _inputs(device, MIXED, form, 2)
    inputs = (query, weights.to(device), pool_copy(keys, device), moved(index, device), RATIO, 50)
    whole = select_entries(*inputs)
    monkeypatch.setattr(gpu_indexer, "MAX_SCORES", 7 * index.page_table.shape[1] * index.page_tokens // RATIO)
    assert torch.equal(select_entries(*inputs), whole)
    scores = _run_scores(device, query, weights, keys, index, 50, 0, None)
    for line, row, position in zip(whole.cpu(), scores, index.positions_T.tolist(), strict=True):
        seen = (position + 1) // RATIO
        best = (
            range(seen)
            if seen <= 50
            else sorted(top_entries_ref(row[None, :seen], torch.tensor([seen]), 50)[0].tolist())
        )
        assert [entry for entry in line.tolist() if entry >= 0] == list(best)


@pytest.mark.gpu
def test_a_graph_replays_the_whole_selection(device):
    index, keys, _, weights = _inputs(device, DECODE, "key_mxfp4", 1)
    pool_there, index_there, weights_there = pool_copy(keys, device), moved(index, device), weights.to(device)
    angles = rope_angles(index_there.positions_T, torch.logspace(0, -4, 32, device=device))
    raw = _randn(index.num_tokens, HEADS, WIDTH, seed=1).bfloat16().to(device)

    def select():
        query = index_query(raw, angles, pool_there, simulate=True)
        return select_entries(query, weights_there, pool_there, index_there, RATIO, 512)

    expected = select().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select()
    captured.fill_(-7)
    graph.replay()
    assert torch.equal(captured, expected)
