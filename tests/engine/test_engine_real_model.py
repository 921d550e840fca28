"""The real model in the engine: company, chunking, preemption and hand-over of raw bytes change no token."""

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import LoadedRank, load_rank
from runtime.requests import EngineStats, ReceiveState, SamplingParams, SendState, StepOutput, Submit
from tests.engine.wire import Wire, WireConnector

LENGTHS = (5, 33, 64, 90)
NEW_TOKENS = 14


def load(checkpoint: Path, **settings: object) -> LoadedRank:
    config = EngineConfig(
        model=str(checkpoint), device="cpu", numerics="plain", block_size=32, max_num_seqs=4, max_held_requests=2,
        **{"max_num_batched_tokens": 512, "num_pages": 40, **settings},
    )  # fmt: skip
    loaded = load_rank(config, holds_states=True, progress=False)
    loaded.memory.pages.fill_(0xFF)
    loaded.memory.slots.fill_(0xFF)
    return loaded


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 1000, length).tolist() for length in LENGTHS]


def submit(index: int, prompt: list[int], **options: object) -> Submit:
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=1.0 if index % 2 else 0.0, seed=index, logprobs=1, ignore_eos=True
    )
    return Submit(request_id=f"r{index}", prompt_ids=tuple(prompt), sampling=sampling, **options)


def run(engine: Engine, requests: list[Submit]) -> tuple[dict[str, list[int]], dict[str, list[float]], EngineStats]:
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for message in engine.step():
            assert isinstance(message, StepOutput), message
            for output in message.outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                logprobs.setdefault(output.request_id, []).extend(entry.logprob for entry in output.logprobs)
        engine.check_integrity()
    return tokens, logprobs, engine.stats()


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, prompts: list[list[int]]) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    loaded = load(tiny_checkpoint)
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    for index, prompt in enumerate(prompts):
        engine = Engine(loaded.config, loaded.shape, loaded.forward)
        got_tokens, got_logprobs, _ = run(engine, [submit(index, prompt)])
        tokens |= got_tokens
        logprobs |= got_logprobs
    return tokens, logprobs


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({}, False),
        ({"max_num_batched_tokens": 37}, False),
        ({"num_pages": 9}, True),
        ({"num_pages": 9, "async_scheduling": "on"}, True),
        ({"async_scheduling": "on", "cudagraph_capture_sizes": (3, 4)}, False),
    ],
    ids=["together", "odd chunks", "few pages", "few pages, ahead", "padded, ahead"],
)
def test_tokens_do_not_depend_on_company_chunks_or_pages(tiny_checkpoint, prompts, alone, settings, preempts):
    loaded = load(tiny_checkpoint, **settings)
    engine = Engine(loaded.config, loaded.shape, loaded.forward)
    tokens, logprobs, stats = run(engine, [submit(index, prompt) for index, prompt in enumerate(prompts)])
    assert tokens == alone[0]
    for request_id, values in logprobs.items():
        assert values == pytest.approx(alone[1][request_id], abs=1e-4)
    assert bool(stats.preemptions) == preempts
    assert stats.pages_free == stats.pages_total


class _Bytes:
    """What `WireConnector` copies: the pools of one rank."""

    def __init__(self, loaded: LoadedRank) -> None:
        self.pages, self.slots = loaded.memory.pages, loaded.memory.slots


def test_raw_bytes_handed_over_give_the_tokens_of_one_process(tiny_checkpoint, prompts, alone):
    wire = Wire()
    engines = []
    for settings in ({"max_num_batched_tokens": 20}, {}):
        loaded, connector = load(tiny_checkpoint, **settings), WireConnector(wire)
        connector.model = _Bytes(loaded)
        engines.append(Engine(loaded.config, loaded.shape, loaded.forward, connector=connector))
    prefill, decode = engines
    for index, prompt in enumerate(prompts):
        prefill.submit(submit(index, prompt, handoff=SendState(transfer_id=f"t{index}")))
        receive = ReceiveState(transfer_id=f"t{index}", source_address="x:1", source_epoch="")
        decode.submit(submit(index, prompt, handoff=receive))
    tokens: dict[str, list[int]] = {}
    for _ in range(200):
        prefill.step()
        wire.pump()
        for message in decode.step():
            for output in getattr(message, "outputs", ()):
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        if sum(map(len, tokens.values())) == len(prompts) * NEW_TOKENS:
            break
    assert tokens == alone[0]
    prefill.step()
    for engine in engines:
        engine.check_integrity()
        assert engine.stats().pages_free == engine.stats().pages_total


def test_every_auto_is_resolved_to_what_runs(tiny_checkpoint):
    loaded = load_rank(EngineConfig(model=str(tiny_checkpoint), kv_cache_memory_bytes=1 << 26), holds_states=False)
    settings = loaded.config
    assert "auto" not in (settings.device, settings.dtype, settings.kv_cache_dtype, settings.index_cache_dtype)
    assert (settings.async_scheduling, settings.cudagraph_capture_sizes) == ("off", ())
    assert settings.num_pages == loaded.memory.pages.shape[0] == loaded.shape.num_pages
    assert settings.max_model_len == loaded.shape.max_model_len <= loaded.model_config.max_position_embeddings
    assert loaded.memory.pages.shape[1] == loaded.layout.page_bytes
    assert loaded.memory.slots.shape == (settings.max_num_seqs + 1, loaded.layout.slot_bytes)
    assert loaded.shape.eos_ids == (loaded.model_config.eos_token_id,)


def test_dummy_weights_are_finite_and_seeded(tiny_checkpoint):
    logits = []
    for seed in (1, 1, 2):
        loaded = load(tiny_checkpoint, load_format="dummy", seed=seed)
        engine = Engine(loaded.config, loaded.shape, loaded.forward)
        tokens, values, _ = run(engine, [submit(0, [5, 6, 7])])
        logits.append((tokens["r0"], values["r0"]))
    assert np.isfinite(logits[0][1]).all()
    assert logits[0] == logits[1]
    assert logits[0] != logits[2]
    assert torch.get_default_dtype() == torch.float32
