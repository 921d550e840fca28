"""Ranks that step together: nobody waits for ever, nobody steps for nothing, and the tokens are those of one rank."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from engine.bell import Bell
from engine.config import EngineConfig
from engine.engine import Engine
from engine.expert_exchange import ExpertExchange, expert_range
from engine.loader import load_rank
from engine.lockstep import Lockstep, RankGroup
from engine.parallel import StepIntent
from runtime.errors import EngineError
from runtime.requests import SamplingParams, StepOutput, Submit


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Rank:
    """What one thread works with."""

    def __init__(self, rank: int, size: int, port: int, timeout_s: float) -> None:
        self.rank = rank
        self.awake = threading.Event()
        bell = Bell("127.0.0.1", self.awake.set)
        self.group = RankGroup(rank, size, "127.0.0.1", port, bell, timeout_s)
        self.lockstep = Lockstep(self.group)


def run_ranks(size: int, body: Callable[[Rank], Any], timeout_s: float = 20.0) -> list[Any]:
    """`body` on every rank, each in a thread of its own; results by rank.

    Leaving is a round for those who stay, so nobody leaves before all bodies have ended.
    """
    port = free_port()
    all_ended = threading.Barrier(size)

    def one(number: int) -> Any:
        rank = Rank(number, size, port, timeout_s)
        try:
            result = body(rank)
            all_ended.wait(100)
            return result
        except threading.BrokenBarrierError:
            return None  # another body failed, and says why
        except BaseException:
            all_ended.abort()
            raise
        finally:
            rank.lockstep.leave()
            rank.group.close()

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, number) for number in range(size)]
        return [future.result(timeout=120) for future in futures]


def step_through(rank: Rank, work: list[int], done: Callable[[int], None]) -> list[tuple[int, ...]]:
    """Offer `work[i]` tokens as the rank's i-th intent that is answered with a run; sleep while nothing calls."""
    ran: list[tuple[int, ...]] = []
    offered = 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        tokens = work[offered] if offered < len(work) else 0
        if offered < len(work) and not tokens and not rank.lockstep.busy:
            offered += 1  # a pause of this rank
            continue
        plan = rank.lockstep.agree(StepIntent(num_tokens=tokens, decode_only=True))
        if plan.runs:
            assert plan.num_tokens[rank.rank] == tokens
            ran.append(plan.num_tokens)
            offered += offered < len(work)
        elif offered >= len(work):
            done(rank.rank)
            if all_done.is_set():
                return ran
            rank.awake.wait(0.02)
            rank.awake.clear()
    raise AssertionError(f"rank {rank.rank} stalled at {offered} of {len(work)}")


all_done = threading.Event()


@pytest.mark.parametrize("pattern", ["one busy", "bursts", "alternating", "random", "all busy"])
def test_no_distribution_of_work_stalls(pattern):
    size, steps = 4, 500
    rng = np.random.default_rng(7)
    work = {
        "one busy": [[3] * steps, [], [], []],
        "bursts": [([1] * 5 + [0] * 20) * (steps // 25) for _ in range(size)],
        "alternating": [[int(i % size == rank) for i in range(steps)] for rank in range(size)],
        "random": [rng.integers(0, 3, steps).tolist() for _ in range(size)],
        "all busy": [[rank + 1] * steps for rank in range(size)],
    }[pattern]
    finished: set[int] = set()
    lock = threading.Lock()
    all_done.clear()

    def done(rank: int) -> None:
        with lock:
            finished.add(rank)
            if len(finished) == size:
                all_done.set()

    ran = run_ranks(size, lambda rank: step_through(rank, work[rank.rank], done))
    assert all(history == ran[0] for history in ran), "the ranks did not step together"
    for rank in range(size):
        assert sum(step[rank] for step in ran[0]) == sum(work[rank])
    assert all(any(step) for step in ran[0]), "a step was run for nobody"


def test_idle_ranks_make_no_rounds():
    def body(rank: Rank) -> int:
        for _ in range(100):
            assert not rank.lockstep.agree(StepIntent(num_tokens=0, decode_only=True)).runs
        return rank.lockstep._round

    assert run_ranks(2, body) == [0, 0]


def test_a_rank_that_leaves_ends_the_steps_of_all():
    def body(rank: Rank) -> str:
        if rank.rank == 0:
            rank.lockstep.agree(StepIntent(num_tokens=1, decode_only=True))
            rank.lockstep.leave()
            return "left"
        while not rank.lockstep.busy:
            rank.awake.wait(0.02)
        assert rank.lockstep.agree(StepIntent(num_tokens=1, decode_only=True)).runs
        assert not rank.lockstep.agree(StepIntent(num_tokens=1, decode_only=True)).runs
        assert not rank.lockstep.busy
        return "stopped"

    assert run_ranks(3, body) == ["left", "stopped", "stopped"]


def test_a_peer_that_does_not_answer_is_an_error_and_no_hang():
    release = threading.Event()

    def body(rank: Rank) -> str:
        if rank.rank == 1:
            release.wait(30)
            return "silent"
        try:
            rank.lockstep.agree(StepIntent(num_tokens=1, decode_only=True))
        except EngineError as error:
            return str(error)
        finally:
            release.set()
        return "answered"

    answers = run_ranks(2, body, timeout_s=5.0)
    assert "lost a peer" in answers[0]


def test_experts_are_shared_out_without_gap():
    for experts, size in ((8, 2), (8, 3), (256, 4), (5, 5)):
        ranges = [expert_range(experts, rank, size) for rank in range(size)]
        assert [expert for part in ranges for expert in part] == list(range(experts))


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 900, length).tolist() for length in (5, 40, 17, 64, 3, 33)]


def request(index: int, prompt: list[int]) -> Submit:
    sampling = SamplingParams(max_tokens=4 + 3 * index, temperature=0.0, ignore_eos=True)
    return Submit(request_id=f"r{index}", prompt_ids=tuple(prompt), sampling=sampling)


def collect(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for message in engine.step():
        assert isinstance(message, StepOutput), message
        for output in message.outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)


@pytest.mark.parametrize("size", [2, 4])
def test_data_and_expert_parallel_ranks_give_the_tokens_of_one_rank(tiny_checkpoint, size):
    config = EngineConfig(
        model=str(tiny_checkpoint), device="cpu", numerics="plain", block_size=32, num_pages=30, max_num_seqs=4,
        max_num_batched_tokens=32,
    )  # fmt: skip
    alone = load_rank(config, holds_states=False, progress=False)
    engine = Engine(alone.config, alone.shape, alone.forward)
    expected: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts()):
        engine.submit(request(index, prompt))
    while engine.has_work:
        collect(engine, expected)
    unfinished = threading.Semaphore(0)

    def body(rank: Rank) -> tuple[dict[str, list[int]], int]:
        loaded = load_rank(
            config,
            holds_states=False,
            progress=False,
            experts=expert_range(alone.model_config.n_routed_experts, rank.rank, size),
            expert_parallel=ExpertExchange(rank.group, rank.lockstep),
        )
        engine = Engine(loaded.config, loaded.shape, loaded.forward, parallel=rank.lockstep)
        tokens: dict[str, list[int]] = {}
        # The last rank gets nothing to do itself.
        mine = [index for index in range(len(prompts())) if index % (size - 1) == rank.rank]
        for index in mine:
            engine.submit(request(index, prompts()[index]))
        deadline = time.monotonic() + 100
        reported = False
        while time.monotonic() < deadline:
            if engine.has_work:
                collect(engine, tokens)
            elif not reported:
                reported = True
                unfinished.release()
            elif unfinished._value >= size:
                break
            else:
                rank.awake.wait(0.02)
                rank.awake.clear()
        engine.check_integrity()
        return tokens, engine.stats().steps

    results = run_ranks(size, body, timeout_s=60)
    got = {request_id: tokens for part, _ in results for request_id, tokens in part.items()}
    assert got == expected
    assert len({steps for _, steps in results}) == 1, "every rank takes part in every step"
