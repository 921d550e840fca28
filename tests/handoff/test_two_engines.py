"""A prefill and a decode engine in two processes, a state between them through Mooncake: what one engine says, exactly.

Equal means tokens, logprobs of five candidates each, and their ranks, without tolerance. On a GPU the pools of both
sides lie in its memory and steps are captured and launched ahead, as in production.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from model.presets import flash
from runtime.requests import ReceiveState, SamplingParams, SendState
from tests.handoff.engine_rank import Answer, Ask, RankProcess, Ready, Role

READY_S, WORD_S = 120.0, 60.0
LENGTHS = (1, 5, 64, 129, 300, 31)
TINY: dict[str, Any] = {"block_size": 64, "num_pages": 40}
ON_GPU: dict[str, Any] = {"device": "cuda", "async_scheduling": "on", "cudagraph_capture_sizes": (2, 8)}


def at_the_width_of_flash(directory: Path) -> tuple[EngineConfig, int]:
    """Four layers with few experts and made-up weights on a GPU, and the size of its vocabulary."""
    whole = flash()
    config = msgspec.structs.replace(
        whole, num_hidden_layers=4, compress_ratios=whole.compress_ratios[:4], num_nextn_predict_layers=0,
        n_routed_experts=16,
    )  # fmt: skip
    (directory / "config.json").write_bytes(config.to_json())
    engine = EngineConfig(
        model=str(directory), load_format="dummy", num_pages=64, max_num_seqs=16, max_model_len=8192, **ON_GPU
    )
    return engine, config.vocab_size


@contextmanager
def rank(role: Role, config: EngineConfig, transfer: TransferConfig) -> Iterator[RankProcess]:
    process = RankProcess(role, config, None if role == "standalone" else transfer)
    try:
        yield process
    finally:
        process.stop()


def sampling_of(index: int, num_tokens: int) -> SamplingParams:
    """Every other request is drawn at random."""
    return SamplingParams(
        max_tokens=num_tokens, temperature=0.8 * (index % 2), seed=index, logprobs=5, ignore_eos=True, top_p=0.95
    )


def compare(
    config: EngineConfig,
    transport: str,
    lengths: tuple[int, ...],
    vocab: int,
    num_tokens: int = 12,
    decode_device: str | None = None,
    at_once: bool = True,
) -> None:
    """The same requests to one engine and to a pair, `at_once` or one after the other."""
    devices = {"decode": decode_device or config.device}
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, vocab, length).tolist() for length in lengths]
    asks = [Ask(f"r{n}", prompt, sampling_of(n, num_tokens)) for n, prompt in enumerate(prompts)]
    transfer = msgspec.convert({"transport": transport, "verify": "full"}, TransferConfig)
    with ExitStack() as stack:
        # Started side by side: on a GPU most of their time is compiling, which they share.
        alone, prefill, decode = (
            stack.enter_context(
                rank(role, msgspec.structs.replace(config, device=devices.get(role, config.device)), transfer)
            )
            for role in ("standalone", "prefill", "decode")
        )
        alone.wait_ready(READY_S)
        source = prefill.wait_ready(READY_S)
        decode.wait_ready(READY_S)
        done = 0
        for group in [asks] if at_once else [[ask] for ask in asks]:
            done += len(group)
            ids = {ask.request_id: f"{int(ask.request_id[1:]):032x}" for ask in group}
            alone.ask(group)
            prefill.ask([hand_off(ask, SendState(transfer_id=ids[ask.request_id])) for ask in group])
            decode.ask([hand_off(ask, receive_from(ids[ask.request_id], source)) for ask in group])
            prefilled = prefill.finish(done, WORD_S)
            decoded = decode.finish(done, WORD_S)
            expected = alone.finish(done, WORD_S)
    assert decoded.keys() == expected.keys()
    for ask in asks:
        assert_same(decoded[ask.request_id], expected[ask.request_id], f"a prompt of {len(ask.prompt)} tokens")
        assert prefilled[ask.request_id].token_ids == expected[ask.request_id].token_ids[:1]


def hand_off(ask: Ask, handoff: SendState | ReceiveState) -> Ask:
    return Ask(ask.request_id, ask.prompt, ask.sampling, handoff)


def receive_from(transfer_id: str, source: Ready) -> ReceiveState:
    return ReceiveState(transfer_id=transfer_id, source_address=source.address, source_epoch=source.epoch)


def assert_same(got: Answer, expected: Answer, what: str) -> None:
    assert got.token_ids == expected.token_ids, what
    assert got.logprobs == expected.logprobs, what
    assert np.isfinite([entry.logprob for entry in got.logprobs]).all(), what
    assert got.finish_reason == expected.finish_reason == "length", what


@pytest.mark.parametrize("numerics", ["plain", "released"])
def test_two_engines_say_what_one_says_on_a_cpu(tiny_checkpoint: Path, numerics: str) -> None:
    config = msgspec.convert(
        {"model": str(tiny_checkpoint), "device": "cpu", "numerics": numerics, **TINY}, EngineConfig
    )
    compare(config, "tcp", LENGTHS[:4], 1000, num_tokens=4)


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["intra_node", "tcp"])
@pytest.mark.parametrize("numerics", ["released", "plain"])
def test_two_engines_say_what_one_says_on_a_gpu(tiny_checkpoint: Path, numerics: str, transport: str) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), numerics=numerics, **TINY, **ON_GPU)  # type: ignore[arg-type]
    released = numerics == "released"
    if not released:  # its experts are the reference, which looks at numbers on the host
        config = msgspec.structs.replace(config, enforce_eager=True)
    compare(config, transport, LENGTHS, 1000, at_once=released)


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["intra_node", "tcp"])
def test_two_engines_say_what_one_says_at_the_width_of_flash(tmp_path: Path, transport: str) -> None:
    engine, vocab = at_the_width_of_flash(tmp_path)
    compare(engine, transport, (1, 300, 2500, 6000, 257), vocab)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["intra_node", "tcp"])
def test_a_state_that_crosses_to_another_gpu_continues_exactly(tiny_checkpoint: Path, transport: str) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), **TINY, **ON_GPU | {"device": "cuda:0"})
    compare(config, transport, LENGTHS, 1000, decode_device="cuda:1")
