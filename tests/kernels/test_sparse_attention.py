"""Sparse attention from packed rows against its twin, on batches that mix long chunks and single tokens."""

from __future__ import annotations

import pytest
import torch

from kernels.batch_index import BatchIndex
from kernels.gpu_attention import fits_hopper, most_parts, sparse_attention_hopper, table_rows, widening_pays
from kernels.indexer import all_entries
from kernels.packed_rows import PackedRows, write_rows
from kernels.quantize import QuantizedRows, decode_e4m3
from kernels.rope import rope_angles
from kernels.sparse_attention import sparse_attention_for_fp8, sparse_attention_ref
from kernels.triton_quantize import scale_stride
from kernels.triton_rotary import inverse_rope_quantize
from kernels.triton_sparse_attention import PART_BLOCKS, Division, join_parts, sparse_attention_triton

PAGE_TOKENS, RATIO = 32, 4


def _pool(device, pages, rows, width, form) -> PackedRows:
    """A layer's region inside larger records, poisoned: what nobody wrote is NaN."""
    if form == "bf16":
        record = torch.full((pages, rows * width + 64), torch.nan, dtype=torch.bfloat16, device=device)
        data = record[:, 32 : 32 + rows * width].unflatten(1, (rows, width))
        return PackedRows(format="bf16", width=width, rope_dim=64, data=data)
    data_bytes, scale_bytes = width + 64, -(-(width - 64) // 64 // 8) * 8
    size = rows * (data_bytes + scale_bytes)
    record = torch.full((pages, -(-size // 128) * 128 + 256), 0xFF, dtype=torch.uint8, device=device)[:, 128:]
    data = record[:, : rows * data_bytes].unflatten(1, (rows, data_bytes))
    scales = record[:, rows * data_bytes : size].unflatten(1, (rows, scale_bytes))
    return PackedRows(format="kv_fp8", width=width, rope_dim=64, data=data, scales=scales)


def _case(generator, device, requests, *, heads, width, window, listed, form, magnitude=1.0):
    """requests: (tokens already there, new tokens) of each. magnitude: of rows, and queries are as much smaller."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    contexts, counts = [context for context, _ in requests], [count for _, count in requests]
    starts = torch.tensor([0, *counts], dtype=torch.int32, device=device).cumsum(0).int()
    num_tokens = int(starts[-1])
    most_pages = max(-(-(context + count) // PAGE_TOKENS) for context, count in requests)
    table = torch.randperm(len(requests) * most_pages, generator=generator, device=device).int()
    index = BatchIndex(
        token_request_T=torch.repeat_interleave(torch.tensor(counts, device=device)).int(),
        positions_T=torch.cat([torch.arange(c, c + n, device=device) for c, n in requests]),
        query_start=starts,
        context_len_B=torch.tensor(contexts, dtype=torch.int32, device=device),
        slot_ids_B=torch.randperm(len(requests) + 2, generator=generator, device=device)[: len(requests)].int(),
        page_table=table.view(len(requests), most_pages),
        page_tokens=PAGE_TOKENS,
    )
    ring = _pool(device, len(requests) + 2, window, width, form)
    entries = _pool(device, len(requests) * most_pages, PAGE_TOKENS // RATIO, width, form)
    chunk = ring.like(num_tokens)
    every = torch.arange(num_tokens, device=device)
    write_rows(chunk, torch.zeros_like(every), every, magnitude * normal(num_tokens, width))
    selected = torch.full((num_tokens, listed), -1, dtype=torch.int32, device=device)
    for request, (context, count) in enumerate(requests):
        kept = torch.arange(max(0, context - window), context, device=device)
        slot = index.slot_ids_B[request].long().expand_as(kept)
        write_rows(ring, slot, kept % window, magnitude * normal(len(kept), width))
        for token in range(count):
            seen = (context + token + 1) // RATIO
            number = torch.randperm(seen, generator=generator, device=device)[:listed].int()
            place = torch.randperm(listed, generator=generator, device=device)[: len(number)]
            selected[int(starts[request]) + token, place] = number
        entry = torch.arange((context + count) // RATIO, device=device)
        page, row = index.entry_location(torch.full_like(entry, request), entry, RATIO)
        write_rows(entries, page.long(), row.long(), magnitude * normal(len(entry), width))
    query = 2 / magnitude * normal(num_tokens, heads, width)
    sink = torch.randn(heads, generator=generator, device=device)
    return query, chunk, ring, sink, index, entries, selected


def _relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


BATCHES = {
    "nothing": [(0, 0)],
    "first token": [(0, 1)],
    "decode": [(5, 1), (31, 1), (200, 1)],
    "chunk": [(0, 18)],
    "mixed": [(70, 2), (0, 3), (16, 1), (15, 3)],
}


@pytest.mark.parametrize("blocks", [PART_BLOCKS, 2], ids=["whole", "in parts"])
@pytest.mark.parametrize("form", ["kv_fp8", "bf16"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_attention_matches_the_reference(generator, device, batch, form, blocks):
    query, chunk, ring, sink, index, entries, selected = _case(
        generator, device, batch, heads=5, width=128, window=16, listed=40, form=form
    )
    got = sparse_attention_triton(query, chunk, ring, sink, index, 128**-0.5, entries, selected, RATIO, blocks)
    expected = sparse_attention_ref(query.float(), chunk, ring, sink, index, 128**-0.5, entries, selected, RATIO)
    assert got.shape == query.shape
    assert _relative(got, expected) < 6e-3


def test_a_layer_without_entries_attends_to_its_window(generator, device):
    query, chunk, ring, sink, index, _, _ = _case(
        generator, device, [(40, 2), (0, 3)], heads=8, width=128, window=20, listed=0, form="kv_fp8"
    )
    got = sparse_attention_triton(query, chunk, ring, sink, index, 0.1)
    assert _relative(got, sparse_attention_ref(query.float(), chunk, ring, sink, index, 0.1)) < 6e-3


@pytest.mark.parametrize("blocks", [PART_BLOCKS, 1], ids=["whole", "in parts"])
@pytest.mark.parametrize("form", ["kv_fp8", "bf16"])
def test_without_a_list_every_visible_entry_counts(generator, device, form, blocks):
    query, chunk, ring, sink, index, entries, _ = _case(
        generator, device, [(150, 1), (0, 5), (33, 2), (2, 1)], heads=4, width=128, window=8, listed=0, form=form
    )
    got = sparse_attention_triton(query, chunk, ring, sink, index, 0.1, entries, None, RATIO, blocks)
    visible = all_entries(index, RATIO)
    expected = sparse_attention_ref(query.float(), chunk, ring, sink, index, 0.1, entries, visible, RATIO)
    assert _relative(got, expected) < 6e-3
    assert torch.equal(
        sparse_attention_ref(query, chunk, ring, sink, index, 0.1, entries, None, RATIO),
        sparse_attention_ref(query, chunk, ring, sink, index, 0.1, entries, visible, RATIO),
    )


@pytest.mark.parametrize("every", [False, True], ids=["listed", "every"])
def test_a_token_does_not_depend_on_its_batch(generator, device, every):
    """Of parts of two blocks it has two, the longest of its batch four."""
    query, chunk, ring, sink, index, entries, selected = _case(
        generator,
        device,
        [(50, 1), (240, 1), (700, 1), (3, 1)],
        heads=4,
        width=128,
        window=16,
        listed=60,
        form="kv_fp8",
    )
    chosen = (lambda tokens: None) if every else selected.__getitem__
    whole = sparse_attention_triton(query, chunk, ring, sink, index, 0.1, entries, chosen(slice(None)), RATIO, 2)
    one = BatchIndex(
        token_request_T=index.token_request_T[:1],
        positions_T=index.positions_T[1:2],
        query_start=index.query_start[:2],
        context_len_B=index.context_len_B[1:2],
        slot_ids_B=index.slot_ids_B[1:2],
        page_table=index.page_table[1:2, :8],
        page_tokens=PAGE_TOKENS,
    )
    first = ring.like(1)
    first.data.copy_(chunk.data[:, 1:2])
    assert first.scales is not None
    assert chunk.scales is not None
    first.scales.copy_(chunk.scales[:, 1:2])
    alone = sparse_attention_triton(query[1:2], first, ring, sink, one, 0.1, entries, chosen(slice(1, 2)), RATIO, 2)
    assert torch.equal(alone[0], whole[1])


@pytest.mark.parametrize(("entries", "window", "parts"), [(0, 128, 1), (512, 128, 1), (1920, 128, 1), (1921, 128, 2)])
def test_only_many_keys_are_divided(entries, window, parts):
    assert most_parts(entries, window) == parts


def test_the_hopper_kernel_is_not_offered_other_shapes(generator, device):
    query, _, ring, _, index, _, _ = _case(
        generator, device, [(3, 1)], heads=64, width=128, window=16, listed=8, form="kv_fp8"
    )
    assert not fits_hopper(query, ring, index)


def _angles(index):
    frequencies = torch.linspace(1.0, 0.001, 32, device=index.positions_T.device)
    return rope_angles(index.positions_T, frequencies)


def _values(rows: QuantizedRows):
    """Quantised rows -> float32 [T, D]."""
    codes = decode_e4m3(rows.codes_RD.view(torch.uint8)).unflatten(1, (-1, 128))
    return (codes * rows.scales_GR[:, : codes.shape[0]].T[..., None]).flatten(1)


@pytest.mark.parametrize("divided", [False, True], ids=["all in parts", "some in parts"])
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_joined_parts_are_rotated_back_and_quantised_like_the_output(generator, device, splits, divided):
    tokens, heads, width = 5, 3, 256
    shape = (tokens, splits, heads)
    parts = torch.randn(*shape, width, generator=generator, device=device)
    tops = 3 * torch.randn(shape, generator=generator, device=device)
    norms = 1 + torch.rand(shape, generator=generator, device=device)
    sink = torch.randn(heads, generator=generator, device=device)
    angles = rope_angles(torch.arange(tokens, device=device) + 7, torch.linspace(1.0, 0.01, 32, device=device))
    plain = torch.full((tokens, heads, width), torch.nan, dtype=torch.bfloat16, device=device)
    codes = torch.zeros(tokens, heads, width, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scales = torch.full((heads * width // 128, scale_stride(tokens)), torch.nan, device=device)
    division = None
    first = 0
    if divided:
        # A tile of window, and one for every four entries begun, of which token t has t + 1; two tiles a part.
        division = Division(4 * torch.arange(tokens, device=device) + 3, 4, 1, 0, 4, 2)
        first = 4  # tokens with up to four entries have one part: their output is there
        for token in range(first, tokens):
            tops[token, 2:], norms[token, 2:], parts[token, 2:] = torch.nan, torch.nan, torch.nan
    join_parts(parts, tops, norms, sink, plain, scales, None, division)
    join_parts(parts, tops, norms, sink, codes, scales, angles, division)
    assert plain[:first].isnan().all()
    assert not plain[first:].isnan().any()
    assert not codes[:first].view(torch.uint8).any()
    expected = inverse_rope_quantize(plain[first:], angles[0][first:], angles[1][first:])
    assert torch.equal(codes.flatten(1).view(torch.uint8)[first:], expected.codes_RD.view(torch.uint8))
    assert torch.equal(scales[:, first:tokens], expected.scales_GR[:, : tokens - first])


def test_rows_are_widened_only_where_each_is_read_often():
    def index(tokens: int, requests: int, pages: int) -> BatchIndex:
        return BatchIndex(
            token_request_T=torch.zeros(tokens, dtype=torch.int32),
            positions_T=torch.zeros(tokens, dtype=torch.int64),
            query_start=torch.zeros(requests + 1, dtype=torch.int32),
            context_len_B=torch.zeros(requests, dtype=torch.int32),
            slot_ids_B=torch.zeros(requests, dtype=torch.int32),
            page_table=torch.zeros(requests, pages, dtype=torch.int32),
            page_tokens=256,
        )

    assert table_rows(index(1000, 2, 8), 128, 64) == 2 * 128 + 1000 + 2 * 8 * 64
    assert table_rows(index(1000, 2, 8), 128, 0) == 2 * 128 + 1000
    assert widening_pays(index(16384, 1, 64), 128, 512, 64)
    assert widening_pays(index(16384, 1, 64), 128, 0, 2)
    assert not widening_pays(index(64, 1, 64), 128, 512, 64)  # too few tokens
    assert not widening_pays(index(512, 64, 512), 128, 512, 64)  # entries of long requests, for few tokens
    assert not widening_pays(index(16384, 1, 4096), 128, 512, 64)  # too large a table


def test_what_leaves_heads_unquantised_leaves_them_unrotated(generator, device):
    query, chunk, ring, sink, index, entries, selected = _case(
        generator, device, [(40, 2), (0, 3)], heads=4, width=128, window=16, listed=8, form="kv_fp8"
    )
    got = sparse_attention_for_fp8(
        query, chunk, ring, sink, index, 0.1, entries, selected, RATIO, _angles(index)
    )  # fmt: skip
    expected = sparse_attention_ref(query.float(), chunk, ring, sink, index, 0.1, entries, selected, RATIO)
    assert isinstance(got, torch.Tensor)
    assert _relative(got, expected) < 6e-3


HOPPER = {
    "direct": {"widened": False},
    "in parts of 5 tiles": {"widened": False, "part_tiles": 5},
    "in parts of 1 tile": {"widened": False, "part_tiles": 1},
    "widened": {"widened": True},
}
LARGE = {
    "nothing": [(0, 0)],
    "decode": [(700, 1), (3000, 1), (0, 1)],
    "edges": [(127, 1), (128, 1), (0, 2), (126, 5), (3, 1), (2047, 1)],
    "chunk": [(100, 70), (0, 3)],
    "mixed": [(0, 150), (700, 1), (33, 61)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOPPER.values(), ids=HOPPER.keys())
@pytest.mark.parametrize("batch", LARGE.values(), ids=LARGE.keys())
def test_the_hopper_kernels_match_the_reference(generator, device, batch, how):
    query, chunk, ring, sink, index, entries, selected = _case(
        generator, device, batch, heads=64, width=512, window=128, listed=512, form="kv_fp8"
    )
    angles = _angles(index)
    for pool, chosen, ratio in ((entries, selected, RATIO), (entries, None, RATIO), (None, None, 0)):
        poison = torch.full((query.numel() * 8,), torch.nan, device=device)  # what outputs and scratch are made of next
        del poison
        got = sparse_attention_hopper(
            query, chunk, ring, sink, index, 512**-0.5, pool, chosen, ratio, **how
        )  # fmt: skip
        rows = sparse_attention_hopper(query, chunk, ring, sink, index, 512**-0.5, pool, chosen, ratio, angles, **how)
        expected = sparse_attention_ref(query.float(), chunk, ring, sink, index, 512**-0.5, pool, chosen, ratio)
        assert isinstance(got, torch.Tensor)
        assert isinstance(rows, QuantizedRows)
        assert _relative(got, expected) < 6e-3
        quantised = inverse_rope_quantize(got, *angles)
        assert torch.equal(rows.scales_GR[:, : len(got)], quantised.scales_GR[:, : len(got)])
        assert _relative(_values(rows), _values(quantised)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [2.0**20, 2.0**-40])
def test_rows_of_any_scale_are_widened_exactly(generator, device, magnitude):
    query, chunk, ring, sink, index, entries, selected = _case(
        generator, device, LARGE["mixed"], heads=64, width=512, window=128, listed=512, form="kv_fp8",
        magnitude=magnitude,
    )  # fmt: skip
    expected = sparse_attention_ref(query.float(), chunk, ring, sink, index, 512**-0.5, entries, selected, RATIO)
    for how in (HOPPER["direct"], HOPPER["widened"]):
        got = sparse_attention_hopper(query, chunk, ring, sink, index, 512**-0.5, entries, selected, RATIO, **how)
        assert isinstance(got, torch.Tensor)
        assert _relative(got, expected) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOPPER.values(), ids=HOPPER.keys())
@pytest.mark.parametrize("every", [False, True], ids=["listed", "every"])
def test_a_token_of_the_hopper_kernels_does_not_depend_on_its_batch(generator, device, every, how):
    query, chunk, ring, sink, index, entries, selected = _case(
        generator, device, [(500, 1)] * 150 + [(40, 60), (2500, 1)], heads=64, width=512, window=128, listed=512,
        form="kv_fp8",
    )  # fmt: skip

    def run(tokens: slice, batch: BatchIndex) -> QuantizedRows:
        mine = PackedRows(
            format="kv_fp8", width=512, rope_dim=64, data=chunk.data[:, tokens], scales=chunk.scales[:, tokens]
        )
        chosen = None if every else selected[tokens]
        rows = sparse_attention_hopper(
            query[tokens], mine, ring, sink, batch, 512**-0.5, entries, chosen, RATIO, _angles(batch), **how
        )
        assert isinstance(rows, QuantizedRows)
        return rows

    whole = run(slice(None), index)
    for request, first, count in ((3, 3, 1), (149, 149, 1), (150, 150, 60), (151, 210, 1)):
        tokens = slice(first, first + count)
        end = int(index.context_len_B[request]) + count
        one = BatchIndex(
            token_request_T=torch.zeros(count, dtype=torch.int32, device=device),
            positions_T=index.positions_T[tokens],
            query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
            context_len_B=index.context_len_B[request : request + 1],
            slot_ids_B=index.slot_ids_B[request : request + 1],
            page_table=index.page_table[request : request + 1, : -(-end // PAGE_TOKENS)].contiguous(),
            page_tokens=PAGE_TOKENS,
        )
        alone = run(tokens, one)
        assert torch.equal(alone.codes_RD.view(torch.uint8), whole.codes_RD[tokens].view(torch.uint8))
        assert torch.equal(alone.scales_GR[:, :count], whole.scales_GR[:, tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [PART_BLOCKS, 3], ids=["whole", "in parts"])
@pytest.mark.parametrize("batch", LARGE.values(), ids=LARGE.keys())
def test_the_triton_kernel_matches_at_the_released_size(generator, device, batch, blocks):
    query, chunk, ring, sink, index, entries, selected = _case(
        generator, device, batch, heads=64, width=512, window=128, listed=512, form="kv_fp8"
    )
    for chosen in (selected, None):
        got = sparse_attention_triton(query, chunk, ring, sink, index, 512**-0.5, entries, chosen, RATIO, blocks)
        expected = sparse_attention_ref(query.float(), chunk, ring, sink, index, 512**-0.5, entries, chosen, RATIO)
        assert _relative(got, expected) < 6e-3
