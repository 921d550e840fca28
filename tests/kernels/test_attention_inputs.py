"""Norms, rotation, packing and insertion in one launch, against the twins."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_inputs import attention_inputs_ref
from kernels.rope import rope_angles
from kernels.triton_attention_inputs import attention_inputs_triton, fits
from tests.kernels.state_batches import KV_FORMATS, assert_rows_agree, batch, moved, pool, pool_copy, raw_bytes

CPU = torch.device("cpu")
MIXED = [(5, 3), (0, 2), (7, 0), (60, 1)]
DECODE = [(100, 1), (0, 1), (15, 1)]


def _run(device, requests, *, heads, width, form, dtype, simulate, window=16):
    generator = torch.Generator().manual_seed(len(requests) + heads)
    index = batch(requests)
    tokens = index.num_tokens
    query = torch.randn(tokens, heads, width, generator=generator).to(dtype)
    row = (3 * torch.randn(tokens, width + 32, generator=generator)).to(dtype)[:, 32:]  # one part of a projection
    norm = torch.rand(width, generator=generator) + 0.5
    angles = rope_angles(index.positions_T, 10000.0 ** -(torch.arange(32) / 32))
    ring = pool(len(requests) + 1, window, width, form, 64)
    got_ring = pool_copy(ring, device)
    got = attention_inputs_triton(
        query.clone().to(device), row.to(device), norm.to(device), (angles[0].to(device), angles[1].to(device)), 1e-6,
        got_ring, moved(index, device), simulate=simulate,
    )  # fmt: skip
    expected = attention_inputs_ref(query, row, norm, angles, 1e-6, ring, index, simulate=simulate)
    return got, got_ring, expected, ring


def _check(device, requests, *, dtype, simulate, **shape):
    (query, chunk), ring, (expected, expected_chunk), expected_ring = _run(
        device, requests, dtype=dtype, simulate=simulate, **shape
    )
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(query.cpu(), expected, **tolerance)
    step = 0.08 if simulate else None
    assert_rows_agree(chunk, expected_chunk, share=0.98, step=step)
    assert_rows_agree(ring, expected_ring, share=0.98, step=step)
    return chunk, ring


@pytest.mark.parametrize("form", KV_FORMATS)
@pytest.mark.parametrize("requests", [[], MIXED, DECODE], ids=["none", "mixed", "decode"])
def test_queries_and_rows_match_the_twins(device, form, requests):
    _check(device, requests, heads=5, width=128, form=form, dtype=torch.bfloat16, simulate=form == "kv_fp8")


@pytest.mark.parametrize("simulate", [True, False])
@pytest.mark.parametrize("form", ["bf16", "f32"])
def test_float32_activations_and_plain_pools(device, form, simulate):
    _check(device, MIXED, heads=2, width=256, form=form, dtype=torch.float32, simulate=simulate)


def test_single_tokens_go_to_the_ring_as_they_went_to_the_chunk(device):
    chunk, ring = _check(device, DECODE, heads=1, width=128, form="kv_fp8", dtype=torch.bfloat16, simulate=True)
    index, packed = batch(DECODE), raw_bytes(ring)
    placed = packed[index.slot_ids_B.long(), index.positions_T % 16]
    assert torch.equal(placed, raw_bytes(chunk)[0])


@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
def test_finished_heads_stay_as_they_are_and_rows_are_packed_all_the_same(device, requests):
    generator, index = torch.Generator().manual_seed(3), moved(batch(requests), device)
    tokens = index.num_tokens
    query = torch.randn(tokens, 3, 128, generator=generator).bfloat16().to(device)
    row, norm = torch.randn(tokens, 128, generator=generator).bfloat16().to(device), torch.ones(128, device=device)
    angles = rope_angles(index.positions_T, 10000.0 ** -(torch.arange(32, device=device) / 32))
    rings, chunks = [], []
    for finished in (False, True):
        ring = pool(len(requests) + 1, 16, 128, "kv_fp8", 64)
        ring = pool_copy(ring, device)
        got, chunk = attention_inputs_triton(
            query.clone(), row, norm, angles, 1e-6, ring, index, simulate=True, finished=finished
        )
        assert torch.equal(got, query) == finished
        rings.append(raw_bytes(ring))
        chunks.append(raw_bytes(chunk))
    assert torch.equal(*chunks)
    assert torch.equal(*rings)
    same, _ = attention_inputs_ref(query, row, norm, angles, 1e-6, ring, index, simulate=True, finished=True)
    assert same is query


def test_index_keys_are_no_kv_rows():
    query = torch.zeros(1, 1, 128)
    assert not fits(query, pool(1, 1, 128, "key_fp8", 0))
    assert fits(query, pool(1, 1, 128, "kv_fp8", 64))


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [[(900 + 13 * n, 1) for n in range(300)], [(250, 1000), (0, 37), (3, 1)]])
def test_queries_and_rows_match_at_the_released_size(device, requests):
    _check(device, requests, heads=64, width=512, form="kv_fp8", dtype=torch.bfloat16, simulate=True, window=128)
