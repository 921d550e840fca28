"""Ranks in processes of their own that share the experts say what one rank says that has them all."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ports import free_port
from engine.config import EngineConfig
from node.expert_parallel import ExpertParallelConfig
from runtime.requests import SamplingParams
from tests.handoff.engine_rank import Ask, Place, RankProcess

READY_S, WORD_S = 120.0, 60.0
ON_GPU: dict[str, Any] = {"device": "cuda", "async_scheduling": "on", "cudagraph_capture_sizes": (2, 8)}
LENGTHS = (5, 130, 64, 1, 300, 40)
WITHIN_S = 10.0
"""From a rank's death until the others say so: twice the watch's patience, and time to hear it."""


def config_of(checkpoint: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint), block_size=64, num_pages=40, max_num_seqs=8,
        **{"max_num_batched_tokens": 512, **settings},
    )  # fmt: skip


def requests() -> list[Ask]:
    rng = np.random.default_rng(11)
    return [
        Ask(
            f"r{number}",
            rng.integers(3, 1000, length).tolist(),
            SamplingParams(max_tokens=4 + 2 * number, temperature=0.0, logprobs=0, ignore_eos=True),
        )
        for number, length in enumerate(LENGTHS)
    ]


def start(config: EngineConfig, **sharing: Any) -> list[RankProcess]:
    port = free_port()
    return [
        RankProcess("standalone", config, place=Place(number, 2, port, ExpertParallelConfig(**sharing)))
        for number in range(2)
    ]


def compare(config: EngineConfig, *, tolerance: float) -> None:
    """`tolerance`: of logprobs. Sums over two ranks' experts are added in another order than those of one rank."""
    asks = requests()
    alone = RankProcess("standalone", config)
    ranks = start(config, part_tokens=48, shard_lm_head=True)
    try:
        for process in (alone, *ranks):
            process.wait_ready(READY_S)
        alone.ask(asks)
        for number, process in enumerate(ranks):
            process.ask(asks[number::2])
        got = {
            name: answer
            for number, process in enumerate(ranks)
            for name, answer in process.finish(len(asks[number::2]), WORD_S).items()
        }
        expected = alone.finish(len(asks), WORD_S)
    finally:
        for process in (*ranks, alone):
            process.stop()
    for ask in asks:
        mine, theirs = got[ask.request_id], expected[ask.request_id]
        assert mine.token_ids == theirs.token_ids, f"a prompt of {len(ask.prompt)} tokens"
        logprobs = [[entry.logprob for entry in answer.logprobs] for answer in (mine, theirs)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=tolerance)


def test_two_ranks_say_what_one_says_on_a_cpu(tiny_checkpoint: Path) -> None:
    compare(config_of(tiny_checkpoint, device="cpu", numerics="plain"), tolerance=1e-4)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("numerics", ["released", "plain"])
def test_two_ranks_say_what_one_says_on_two_gpus(tiny_checkpoint: Path, numerics: str) -> None:
    # The plain experts are the reference, which looks at numbers on the host: that cannot be captured.
    settings = ON_GPU if numerics == "released" else ON_GPU | {"enforce_eager": True}
    compare(config_of(tiny_checkpoint, numerics=numerics, **settings), tolerance=0.05)


@pytest.mark.gpu(2)
def test_a_rank_on_a_gpu_ends_within_its_deadline_when_its_peer_is_killed(tiny_checkpoint: Path) -> None:
    survivor, victim = start(config_of(tiny_checkpoint, **ON_GPU))
    try:
        for process in (survivor, victim):
            process.wait_ready(READY_S)
        long = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
        survivor.ask([Ask("long", list(range(10, 40)), long)])
        survivor.collect(WORD_S)
        victim.kill()
        began = time.monotonic()
        said = survivor.last_words(WITHIN_S)
        assert time.monotonic() - began < WITHIN_S
        assert "EngineError" in said
        assert "rank 0" in said
        assert survivor.ends_within(WITHIN_S)
    finally:
        survivor.kill()
        victim.kill()
