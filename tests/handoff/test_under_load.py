"""Hundreds of hand-offs while three processes compute on one GPU: every byte as sent, every answer that of one engine.

Copies that other work delays come apart from what says that they are done, which a machine that does nothing else never
shows. So the decode rank decodes other requests ahead all the time, and a third process computes as well.
"""

import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kv_transfer.config import TransferConfig
from runtime.requests import SamplingParams, SendState
from tests.handoff.engine_rank import Ask
from tests.handoff.test_two_engines import (
    READY_S,
    WORD_S,
    assert_same,
    at_the_width_of_flash,
    hand_off,
    rank,
    receive_from,
)

SECONDS = 8.0
LENGTHS = (1, 1, 5, 300, 1, 2500, 1, 64)
"""Of the prompts that are handed over. The shorter, the sooner a state is looked at after its last byte was read."""
ANSWER = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3, ignore_eos=True)
OTHERS, OTHER_TOKENS = 6, 40


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["intra_node", "tcp"])
def test_hand_offs_are_exact_while_every_process_computes(tmp_path: Path, transport: str) -> None:
    config, vocab = at_the_width_of_flash(tmp_path)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, vocab, length).tolist() for length in LENGTHS]
    transfer = msgspec.convert({"transport": transport, "verify": "full"}, TransferConfig)
    numbers = count()

    def others() -> list[Ask]:
        busy = SamplingParams(max_tokens=OTHER_TOKENS, temperature=0.0, ignore_eos=True)
        return [Ask(f"other{next(numbers)}", rng.integers(3, vocab, 5).tolist(), busy) for _ in range(OTHERS)]

    with ExitStack() as stack:
        alone, prefill, decode = (
            stack.enter_context(rank(role, config, transfer)) for role in ("standalone", "prefill", "decode")
        )
        alone.wait_ready(READY_S)
        source = prefill.wait_ready(READY_S)
        decode.wait_ready(READY_S)
        alone.ask([Ask(f"r{n}", prompt, ANSWER) for n, prompt in enumerate(prompts)])
        expected = dict(alone.finish(len(prompts), WORD_S))
        rounds, until = 0, time.monotonic() + SECONDS
        while time.monotonic() < until:
            rounds += 1
            alone.ask(others())
            decode.ask(others())
            asks = [Ask(f"{rounds}-{n}", prompt, ANSWER) for n, prompt in enumerate(prompts)]
            ids = [f"{next(numbers):032x}" for _ in asks]
            prefill.ask([hand_off(ask, SendState(transfer_id=name)) for ask, name in zip(asks, ids, strict=True)])
            decode.ask([hand_off(ask, receive_from(name, source)) for ask, name in zip(asks, ids, strict=True)])
            prefill.finish(rounds * len(asks), WORD_S)
            decode.finish(rounds * (len(asks) + OTHERS), WORD_S)
            alone.finish(len(prompts) + rounds * OTHERS, WORD_S)
            for n, ask in enumerate(asks):
                what = f"a prompt of {len(ask.prompt)} tokens in round {rounds}"
                assert_same(decode.answers[ask.request_id], expected[f"r{n}"], what)
    print(f"{rounds * len(prompts)} hand-offs over {transport}")
