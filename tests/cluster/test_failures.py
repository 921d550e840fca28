"""Processes die, hang and come back, clients leave: nothing is lost, nothing leaks, the next request succeeds."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.cluster.client import Answer, complete, complete_all, prompts_of_lengths
from tests.cluster.harness import START_S, Cluster, Program, ranks, standalone, wait_healthy

# Chunks of 16 tokens make a prompt of 600 take long enough to be interrupted. The deadlines are shortened ones.
SLOW_PREFILL: dict[str, Any] = {
    "engine": {"numerics": "plain", "dtype": "float32", "block_size": 32},
    "transfer": {
        "lease_s": 2.0,
        "lease_margin_s": 0.5,
        "claim_wait_s": 5.0,
        "hold_unclaimed_s": 5.0,
        "read_deadline_s": 2.0,
        "connect_timeout_s": 2.0,
        "recreate_after_s": 8.0,
    },
}
CHUNKS = {"engine": {"max_num_batched_tokens": 16, "max_num_seqs": 16}}
ROUTER = {"deadlines": {"connect_s": 2.0}}
NUM_TOKENS = 12


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(
    small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[list[int]], list[Answer]]:
    prompts = prompts_of_lengths([600, 500, 333, 64, 1], seed=11)
    async with standalone(tmp_path_factory.mktemp("alone"), small_checkpoint, SLOW_PREFILL) as node:
        return prompts, await complete_all(node.url, prompts, [NUM_TOKENS] * len(prompts), concurrency=1)


async def until(what: str, condition: Callable[[], Awaitable[bool]], deadline_s: float = 20.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < deadline, f"{what}: not within {deadline_s} s"
        await asyncio.sleep(0.01)


async def receiving_from(cluster: Cluster, prefill: Program) -> bool:
    """A state is on its way: some decode rank waits for it and this prefill node computes it."""
    sources = await ranks(prefill.url)
    sinks = [rank for decode in cluster.decode for rank in await ranks(decode.url)]
    return any(rank["running"] for rank in sources) and any(rank["receiving"] for rank in sinks)


async def answered(cluster: Cluster, prompts: list[list[int]], expected: list[Answer]) -> None:
    for prompt, answer in zip(prompts, expected, strict=True):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            assert (await complete(session, cluster.url, prompt, NUM_TOKENS)).token_ids == answer.token_ids


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill -9", "kill -STOP and resume"])
async def test_a_prefill_process_lost_in_mid_transfer_costs_the_client_nothing(
    tmp_path: Path, small_checkpoint: Path, expected: tuple[list[list[int]], list[Answer]], how: int
) -> None:
    prompts, answers = expected
    cluster = Cluster(tmp_path, small_checkpoint, both=SLOW_PREFILL, prefill=[CHUNKS, CHUNKS], router=ROUTER)
    async with cluster:
        victim = cluster.prefill[0]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            # Round robin: of two requests at once, one goes to each prefill node.
            asked = [asyncio.create_task(complete(session, cluster.url, prompts[i], NUM_TOKENS)) for i in (0, 1)]
            await until("a transfer in flight", lambda: receiving_from(cluster, victim))
            victim.signal(how)
            got = await asyncio.gather(*asked)
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in answers[:2]]
        if how == signal.SIGSTOP:
            victim.signal(signal.SIGCONT)
        else:
            victim.kill()
            victim.start()
            await wait_healthy(victim.url, START_S, [victim])
        await cluster.wait_proven()
        await answered(cluster, prompts, answers)
        await cluster.wait_idle()


async def test_a_decode_process_lost_before_the_first_token_costs_the_client_nothing(
    tmp_path: Path, small_checkpoint: Path, expected: tuple[list[list[int]], list[Answer]]
) -> None:
    prompts, answers = expected
    cluster = Cluster(tmp_path, small_checkpoint, both=SLOW_PREFILL, prefill=[CHUNKS], decode=[{}, {}], router=ROUTER)
    async with cluster:
        victim = cluster.decode[0]

        async def receiving() -> bool:
            return any(rank["receiving"] for rank in await ranks(victim.url))

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            asked = [asyncio.create_task(complete(session, cluster.url, prompts[i], NUM_TOKENS)) for i in (0, 1)]
            await until("a claim by the victim", receiving)
            victim.kill()
            got = await asyncio.gather(*asked)
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in answers[:2]]
        victim.start()
        await wait_healthy(victim.url, START_S, [victim])
        await cluster.wait_proven()
        await answered(cluster, prompts, answers)
        await cluster.wait_idle()


async def test_two_hundred_clients_that_leave_at_random_points_leave_nothing_behind(
    tmp_path: Path, small_checkpoint: Path, expected: tuple[list[list[int]], list[Answer]]
) -> None:
    prompts, answers = expected
    rng = random.Random(17)
    cluster = Cluster(tmp_path, small_checkpoint, both=SLOW_PREFILL, prefill=[CHUNKS], router=ROUTER)
    async with cluster:
        gate = asyncio.Semaphore(8)
        left = 0

        async def leave(number: int) -> None:
            nonlocal left
            (prompt,) = prompts_of_lengths([rng.choice([1, 17, 64, 150, 300])], seed=number)
            patience_s = rng.expovariate(1 / 0.15)
            body = {"prompt": prompt, "max_tokens": 64, "stream": rng.random() < 0.7, "ignore_eos": True}
            async with gate, aiohttp.ClientSession() as session:
                with contextlib.suppress(TimeoutError):
                    async with (
                        asyncio.timeout(patience_s),
                        session.post(f"{cluster.url}/v1/completions", json=body) as response,
                    ):
                        assert response.status == 200, await response.text()
                        await response.read()
                        return
                left += 1

        await asyncio.gather(*(leave(number) for number in range(200)))
        assert left >= 100, f"only {left} of 200 clients left early"
        await cluster.wait_idle()
        await answered(cluster, prompts, answers)
        await cluster.wait_idle()
