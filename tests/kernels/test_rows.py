"""Packing rows and moving them into the window, against the twins, byte for byte."""

from __future__ import annotations

import pytest
import torch

from kernels.packed_rows import simulate_row_ref, write_rows_ref
from kernels.triton_rows import fits, insert_window_triton, store_rows_triton
from kernels.window_ring import insert_window_ref
from tests.kernels.state_batches import (
    KEY_FORMATS,
    KV_FORMATS,
    assert_rows_agree,
    batch,
    moved,
    pool,
    pool_copy,
    raw_bytes,
)

CPU = torch.device("cpu")
KINDS = [*((form, 64) for form in KV_FORMATS), *((form, 0) for form in KEY_FORMATS)]


def _rows(generator, count, width, dtype):
    """Rows of every size, with zeros, signed zeros, exact powers of two and ties of the 4-bit grid."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(int(generator.initial_seed())))
    x *= torch.logspace(-20, 20, count, 2.0)[:, None]
    if count:
        x[0] = 0.0
        x[-1, ::3] = -0.0
        x[-1, 1] = 448.0
    if count > 2:
        x[1] = torch.tensor([0.25, 0.75, -1.25, 1.75, 2.5, 3.5, -5.0, 6.0]).repeat(width // 8)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("form", "rope"), KINDS)
@pytest.mark.parametrize("count", [0, 1, 6])
def test_stored_rows_have_the_twins_bytes(generator, device, count, form, rope, dtype):
    width = 128
    rows = _rows(generator, count, width, dtype)
    expected, page, row = pool(3, 4, width, form, rope), torch.arange(count) % 3, torch.arange(count) // 3
    got = pool_copy(expected, device)
    store_rows_triton(got, page.to(device), row.to(device), rows.to(device), simulate=False)
    write_rows_ref(expected, page, row, rows)
    assert torch.equal(raw_bytes(got), raw_bytes(expected))


@pytest.mark.parametrize("form", ["bf16", "f32"])
def test_plain_pools_hold_the_values_that_quantisation_leaves(generator, device, form):
    rows = _rows(generator, 6, 128, torch.bfloat16)
    expected, page, row = pool(2, 3, 128, form, 64), torch.arange(6) % 2, torch.arange(6) // 2
    got = pool_copy(expected, device)
    store_rows_triton(got, page.to(device), row.to(device), rows.to(device), simulate=True)
    write_rows_ref(expected, page, row, simulate_row_ref(expected, rows))
    assert torch.equal(raw_bytes(got), raw_bytes(expected))


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("form", KEY_FORMATS)
def test_index_keys_are_transformed_before_they_are_stored(generator, device, form, width):
    from kernels.packed_rows import store_rows

    rows = torch.randn(6, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, page, row = pool(2, 3, width, form, 0), torch.arange(6) % 2, torch.arange(6) // 2
    got = pool_copy(expected, device)
    store_rows_triton(got, page.to(device), row.to(device), rows.to(device), simulate=True)
    store_rows(expected, page, row, rows, simulate=True)
    assert_rows_agree(got, expected, share=0.97, step=0.4 if form != "key_fp8" else None)


def test_rows_without_whole_blocks_are_left_to_the_twin():
    assert fits(pool(1, 1, 128, "kv_fp8", 64))
    assert not fits(pool(1, 1, 96, "bf16", 0))
    assert not fits(pool(1, 1, 64, "f32", 8))


@pytest.mark.parametrize("form", KV_FORMATS)
@pytest.mark.parametrize(
    "requests",
    [[], [(0, 1)], [(5, 20), (0, 3), (7, 0), (16, 1)], [(100, 1), (3, 1)]],
    ids=["none", "one", "mix", "decode"],
)
def test_windows_get_the_last_rows_of_every_request(generator, device, form, requests):
    index, window = batch(requests), 7
    ring = pool(len(requests) + 1, window, 128, form, 64)
    chunk = ring.like(index.num_tokens)
    chunk.data.view(torch.uint8).copy_(torch.randint(0, 255, chunk.data.view(torch.uint8).shape, dtype=torch.uint8))
    if chunk.scales is not None:
        chunk.scales.fill_(7)
    got = pool_copy(ring, device)
    insert_window_triton(pool_copy(chunk, device), got, moved(index, device))
    insert_window_ref(chunk, ring, index)
    assert torch.equal(raw_bytes(got), raw_bytes(ring))
