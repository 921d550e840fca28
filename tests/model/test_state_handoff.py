"""State is bytes: copied into a fresh, poisoned pool under other page and slot numbers, it continues bit for bit."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from tests.model.helpers import Pools, Request, batch_of, pools, random_model, small_config, step

LENGTHS = [1, 3, 4, 5, 7, 8, 15, 16, 17, 67, 127, 128, 131, 255]
HOW = {
    "float32, plain, f32 rows": ({}, "f32", "f32"),
    "float32, released, fp8 rows": ({"numerics": "released"}, "fp8", "mxfp4"),
    "bfloat16, released, fp8 rows": ({"numerics": "released", "dtype": torch.bfloat16}, "fp8", "fp8"),
    "bfloat16, plain, bf16 rows": ({"dtype": torch.bfloat16}, "bf16", "bf16"),
}
DECODED = 4


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return small_config()


@pytest.fixture(scope="module", params=HOW)
def setup(request: pytest.FixtureRequest, config: ModelConfig) -> tuple[Transformer, str, str]:
    options, row_format, index_format = HOW[request.param]
    return random_model(config, **options), row_format, index_format


def prompt(length: int) -> list[int]:
    return torch.randint(160, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def greedy(model: Transformer, state: Pools, request: Request, logits: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Decodes `count` tokens. -> the logits of every step."""
    steps = [logits[-1]]
    for _ in range(count):
        steps.append(step(model, state.views, [(request, [int(steps[-1].argmax())])])[-1])
    return steps


def handed_over(source: Pools, request: Request, slot: int, pages: list[int], poison: int) -> tuple[Pools, Request]:
    """Copies one request's raw bytes into a new pool full of `poison`, only what it owns."""
    target = Pools(source.layout, poison=poison)
    target.slots[slot] = source.slots[request.slot]
    for i in range(source.layout.pages_for(request.length)):
        target.pages[pages[i]] = source.pages[request.pages[i]]
    return target, Request(slot, pages, request.length)


@pytest.mark.parametrize("length", LENGTHS)
def test_decode_continues_bit_for_bit_from_copied_bytes(setup: tuple[Transformer, str, str], length: int) -> None:
    model, row_format, index_format = setup
    source = pools(model.config, row_format, index_format)
    request = Request(2, [4, 9])
    logits = step(model, source.views, [(request, prompt(length))], all_logits=False)
    target, moved = handed_over(source, request, 1, [7, 3], poison=0xFF)
    here = greedy(model, source, request, logits, DECODED)
    there = greedy(model, target, moved, logits, DECODED)
    assert all(bool(logit.isfinite().all()) for logit in here)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert torch.equal(source.slots[2], target.slots[1]) or _differ_only_in_stale_bytes(source, target)


def _differ_only_in_stale_bytes(source: Pools, target: Pools) -> bool:
    """Regions of layers that ran are equal; MTP regions were not written by either."""
    ran = [region for region in source.layout.slot_regions if region.layer < 6]
    return all(
        torch.equal(
            source.slots[2, r.offset : r.offset + r.num_bytes], target.slots[1, r.offset : r.offset + r.num_bytes]
        )
        for r in ran
    )


@pytest.mark.parametrize("poison", [0x7F, 0xFF])
def test_stale_bytes_are_never_read(setup: tuple[Transformer, str, str], poison: int) -> None:
    model, row_format, index_format = setup
    clean = pools(model.config, row_format, index_format, poison=0)
    dirty = pools(model.config, row_format, index_format, poison=poison)
    tokens = prompt(70)
    for chunks in ([70], [1, 2, 3, 5, 30, 29]):
        requests = [Request(0, [1]), Request(0, [1])]
        at = 0
        for size in chunks:
            pair = [
                step(model, state.views, [(request, tokens[at : at + size])])
                for state, request in zip((clean, dirty), requests, strict=True)
            ]
            at += size
            assert torch.equal(*pair)


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 15, 16, 17, 127, 128, 129, 131])
def test_plain_prefill_in_chunks_equals_prefill_at_once(config: ModelConfig, length: int) -> None:
    model = random_model(config)
    tokens = prompt(length)
    whole = pools(config)
    expected = step(model, whole.views, [(Request(0, [1]), tokens)])
    for sizes in ([1, 2, 4, 8, 16, 32, 64], [3, 5], [15, 1, 1, 16], [length // 2]):
        state, request, at, got = pools(config), Request(3, [2]), 0, []
        for size in [*sizes, length]:
            part = tokens[at : at + size]
            if part:
                got.append(step(model, state.views, [(request, part)]))
                at += len(part)
        assert (torch.cat(got) - expected).abs().max() < 5e-5


def test_a_token_has_the_same_bits_in_every_batch(setup: tuple[Transformer, str, str]) -> None:
    model, row_format, index_format = setup
    lengths = [1, 5, 16, 40, 66, 100, 128, 260]

    def prefilled() -> tuple[Pools, list[Request]]:
        state = pools(model.config, row_format, index_format, num_pages=20, num_slots=8)
        return state, [Request(slot, [2 * slot, 2 * slot + 1]) for slot in range(8)]

    alone, alone_requests = prefilled()
    first = [
        step(model, alone.views, [(request, prompt(length))])
        for request, length in zip(alone_requests, lengths, strict=True)
    ]
    together, requests = prefilled()
    packed = step(model, together.views, [(r, prompt(n)) for r, n in zip(requests, lengths, strict=True)])
    assert torch.equal(packed, torch.cat(first))
    for _ in range(4):
        tokens = [[length % 160] for length in lengths]
        packed = step(model, together.views, list(zip(requests, tokens, strict=True)))
        single = [step(model, alone.views, [(r, t)]) for r, t in zip(alone_requests, tokens, strict=True)]
        assert torch.equal(packed, torch.cat(single))


def test_prefill_chunks_and_decode_tokens_mix_in_one_batch(config: ModelConfig) -> None:
    model = random_model(config)
    state = pools(config, num_pages=8, num_slots=4)
    decoding, prefilling, fresh = Request(0, [1]), Request(1, [2, 3]), Request(2, [5])
    step(model, state.views, [(decoding, prompt(30))])
    step(model, state.views, [(prefilling, prompt(250)[:77])])
    mixed = step(model, state.views, [(decoding, [9]), (prefilling, prompt(250)[77:]), (fresh, prompt(11))])
    for at, request, tokens in ((0, Request(0, [1]), [*prompt(30), 9]), (174, Request(0, [1]), prompt(11))):
        alone = pools(config)
        logits = step(model, alone.views, [(request, tokens)])
        assert (mixed[at] - logits[-1 if at == 0 else 0]).abs().max() < 5e-5


def test_an_empty_batch_runs_and_changes_nothing(setup: tuple[Transformer, str, str]) -> None:
    model, row_format, index_format = setup
    state = pools(model.config, row_format, index_format)
    before = state.slots.clone(), state.pages.clone()
    assert model.forward(batch_of([]), state.views).shape == (0, model.config.vocab_size)
    assert torch.equal(state.slots, before[0])
    assert torch.equal(state.pages, before[1])


def test_only_own_slots_and_pages_are_written(setup: tuple[Transformer, str, str]) -> None:
    model, row_format, index_format = setup
    state = pools(model.config, row_format, index_format, poison=0xA5)
    request = Request(2, [4, 9])
    step(model, state.views, [(request, prompt(300))])
    step(model, state.views, [(request, [1])])
    for pool, own in ((state.slots, {2}), (state.pages, {4, 9})):
        for row in range(pool.shape[0]):
            assert bool((pool[row] == 0xA5).all()) == (row not in own)


def test_plain_numerics_refuse_quantised_state(config: ModelConfig) -> None:
    model = random_model(config)
    for row_format, index_format in (("fp8", "f32"), ("bf16", "mxfp4"), ("bf16", "fp8")):
        with pytest.raises(ValueError, match="plain numerics"):
            step(model, pools(config, row_format, index_format).views, [(Request(0, [1]), [1])])
