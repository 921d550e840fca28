"""Ranks that share the experts answer as one rank that has them all: of one node, of two, and on both sides of a
hand-off."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio

from model.config import ModelConfig
from tests.cluster.client import Answer, complete_all, prompts_of_lengths
from tests.cluster.harness import START_S, Cluster, Program, free_port, ranks, standalone, wait_healthy, wait_idle

PLAIN: dict[str, Any] = {"engine": {"numerics": "plain", "dtype": "float32", "block_size": 32}}
PROMPTS = prompts_of_lengths([1, 5, 16, 33, 64, 100], seed=23)
MAX_TOKENS = [6, 1, 12, 3, 8, 10]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    async with standalone(tmp_path_factory.mktemp("one"), small_checkpoint, PLAIN) as node:
        return await complete_all(node.url, PROMPTS, MAX_TOKENS, concurrency=1)


def shared(num_ranks: int, **group: Any) -> dict[str, Any]:
    """Of a node whose ranks share the experts."""
    return {"data_parallel_size": num_ranks, "enable_expert_parallel": True, "expert_parallel": group}


def assert_same(got: list[Answer], expected: list[Answer]) -> None:
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    for left, right in zip(got, expected, strict=True):
        assert left.logprobs == pytest.approx(right.logprobs, abs=1e-4)


async def steps_of_all(*urls: str, size: int) -> int:
    """How many steps the ranks have made, once all of them say the same: their snapshots are not of one moment."""
    deadline = time.monotonic() + 30
    while True:
        steps = [rank["steps"] for url in urls for rank in await ranks(url)]
        if len(steps) == size and len(set(steps)) == 1:
            return int(steps[0])
        assert time.monotonic() < deadline, f"the ranks did not step together: {steps}"
        await asyncio.sleep(0.1)


async def fetch(url: str) -> str:
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
        assert response.status == 200
        return await response.text()


async def wait_counted(url: str, config: ModelConfig, num_tokens: int) -> None:
    """Until the counters of all layers show as many tokens, each with all its experts."""
    wanted = [num_tokens * config.num_experts_per_tok] * config.num_hidden_layers
    deadline = time.monotonic() + 30
    while (got := [sum(layer) for layer in json.loads(await fetch(f"{url}/cluster/experts"))["layers"]]) != wanted:
        assert time.monotonic() < deadline, f"{got} instead of {wanted}"
        await asyncio.sleep(0.1)


async def test_two_ranks_with_half_the_experts_each_give_the_tokens_of_one(
    tmp_path: Path, small_checkpoint: Path, expected: list[Answer]
) -> None:
    group = {"part_tokens": 24, "shard_lm_head": True, "load_counters": "experts", "load_interval_s": 0.1}
    async with standalone(tmp_path, small_checkpoint, PLAIN | shared(2, **group)) as node:
        alone = await complete_all(node.url, PROMPTS, MAX_TOKENS, concurrency=1)
        together = await complete_all(node.url, PROMPTS, MAX_TOKENS, concurrency=6)
        await wait_idle(node.url)
        steps = await steps_of_all(node.url, size=2)
        assert all(rank["generated_tokens"] for rank in await ranks(node.url)), "both ranks served requests"
        await asyncio.sleep(1.0)
        assert await steps_of_all(node.url, size=2) == steps, "nobody steps when all are idle"
        # The last token of an answer is not computed any more.
        computed = 2 * sum(len(prompt) + tokens - 1 for prompt, tokens in zip(PROMPTS, MAX_TOKENS, strict=True))
        await wait_counted(node.url, ModelConfig.load(small_checkpoint), computed)
        metrics = await fetch(f"{node.url}/metrics")
        assert 'tandem_expert_rank_tokens_total{expert_rank="1",layer="0"}' in metrics
        assert 'tandem_expert_tokens_total{expert="7",layer="3"}' in metrics
    assert_same(alone, expected)
    assert_same(together, expected)


async def test_four_ranks_with_a_quarter_of_the_experts_each_give_the_tokens_of_one(
    tmp_path: Path, small_checkpoint: Path, expected: list[Answer]
) -> None:
    async with standalone(tmp_path, small_checkpoint, PLAIN | shared(4)) as node:
        for concurrency in (1, 6):
            assert_same(await complete_all(node.url, PROMPTS, MAX_TOKENS, concurrency), expected)
        await wait_idle(node.url)


async def test_two_prefill_ranks_and_four_decode_ranks_give_the_tokens_of_one(
    tmp_path: Path, small_checkpoint: Path, expected: list[Answer]
) -> None:
    cluster = Cluster(tmp_path, small_checkpoint, both=PLAIN, prefill=[shared(2)], decode=[shared(4)])
    async with cluster:
        for concurrency in (1, 6):
            assert_same(await complete_all(cluster.url, PROMPTS, MAX_TOKENS, concurrency), expected)
        await cluster.wait_idle()
        await steps_of_all(cluster.prefill[0].url, size=2)
        await steps_of_all(cluster.decode[0].url, size=4)
        counted = [*await ranks(cluster.prefill[0].url), *await ranks(cluster.decode[0].url)]
        assert all(rank["transfers_sent"] or rank["transfers_received"] for rank in counted), "every rank took part"


def engine_processes(node: Program) -> list[psutil.Process]:
    children = psutil.Process(node.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


async def until_ended(nodes: Sequence[Program]) -> None:
    deadline = time.monotonic() + 60
    while any(node.exit_code is None for node in nodes):
        assert time.monotonic() < deadline, f"a node lives on: {[node.exit_code for node in nodes]}"
        await asyncio.sleep(0.1)


async def test_a_group_over_two_nodes_serves_as_one_and_fails_as_one(
    tmp_path: Path, small_checkpoint: Path, expected: list[Answer]
) -> None:
    meeting = {"address": f"127.0.0.1:{free_port()}", "ranks": 4}
    fresh = {"prefill": "local", "drain_timeout_s": 60.0, "engine": {"stats_interval_s": 0.05}}
    nodes = [fresh | shared(2, **meeting, first_rank=first) for first in (0, 2)]
    cluster = Cluster(tmp_path, small_checkpoint, both=PLAIN, prefill=(), decode=nodes)
    async with cluster:
        assert_same(await complete_all(cluster.url, PROMPTS, MAX_TOKENS, concurrency=6), expected)
        for node in cluster.decode:
            assert_same(await complete_all(node.url, PROMPTS, MAX_TOKENS, concurrency=6), expected)
        await cluster.wait_idle()
        await steps_of_all(*(node.url for node in cluster.decode), size=4)

        engine_processes(cluster.decode[1])[0].kill()
        await until_ended(cluster.decode)
        assert all(node.exit_code for node in cluster.decode)
        # Of the killed one, or of one that followed it faster.
        assert re.search(r"lost rank \d: it has ended", cluster.decode[0].log())

        for rank, node in enumerate(cluster.decode):
            node.config |= shared(1, address=meeting["address"], ranks=2, first_rank=rank)
            node.start()
        for node in cluster.decode:
            await wait_healthy(node.url, START_S, cluster.decode)
        answer = asyncio.create_task(complete_all(cluster.decode[1].url, PROMPTS[-1:], [50], concurrency=1))
        while not answer.done():
            if any(rank["running"] for rank in await ranks(cluster.decode[1].url)):
                break
            await asyncio.sleep(0.02)
        assert await asyncio.to_thread(cluster.decode[0].stop, 60.0) == 0
        assert (await answer)[0].token_ids[: MAX_TOKENS[-1]] == expected[-1].token_ids, "what runs elsewhere ends well"
        await until_ended(cluster.decode)
        assert cluster.decode[1].exit_code == 0, "the other node drains as well"
