"""Decode nodes are killed while they stream: every client gets the tokens of an undisturbed run, once each."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.cluster.client import prompts_of_lengths
from tests.cluster.harness import Cluster, wait_healthy

NUM_STREAMS = 8
NUM_TOKENS = 80
# Float32 without quantisation: a token computed as part of a prompt then has the state of one that was decoded, up to
# the order of additions.
PLAIN: dict[str, Any] = {"engine": {"numerics": "plain", "dtype": "float32", "block_size": 32}}


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], sampling: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The choice of every chunk until [DONE]."""
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, "return_token_ids": True}
    async with session.post(f"{url}/v1/completions", json=body | sampling) as response:
        assert response.status == 200, await response.text()
        ids = set()
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                assert len(ids) == 1, f"chunks of several responses: {ids}"
                return
            if line.startswith(b"data: "):
                chunk = json.loads(line.removeprefix(b"data: "))
                assert "error" not in chunk, chunk
                ids.add((chunk["id"], chunk["created"]))
                for choice in chunk["choices"]:
                    yield choice
    raise AssertionError("the stream has no end")


async def run_all(url: str, prompts: list[list[int]], sampling: list[dict[str, Any]], kill: Any = None) -> list[Any]:
    """(text, ids, logprobs, finish reason) of every stream; `kill` is called when half of them are under way."""
    under_way = asyncio.Semaphore(0)

    async def one(session: aiohttp.ClientSession, prompt: list[int], fields: dict[str, Any]) -> Any:
        text, ids, logprobs, finish = "", [], [], None
        async for choice in stream(session, url, prompt, fields):
            text += choice["text"]
            ids += choice["token_ids"]
            logprobs += choice["logprobs"]["token_logprobs"]
            finish = choice["finish_reason"] or finish
            if len(ids) == 5:
                under_way.release()
        return text, ids, logprobs, finish

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        tasks = [asyncio.create_task(one(session, p, s)) for p, s in zip(prompts, sampling, strict=True)]
        # Nodes take turns, so each has some of them.
        for _ in range(NUM_STREAMS // 2):
            await asyncio.wait_for(under_way.acquire(), 60)
        if kill is not None:
            kill()
        return await asyncio.gather(*tasks)


def assert_same(disturbed: list[Any], undisturbed: list[Any]) -> None:
    for number, (got, expected) in enumerate(zip(disturbed, undisturbed, strict=True)):
        assert got[1] == expected[1], f"stream {number}"
        assert got[0] == expected[0]
        assert got[2] == pytest.approx(expected[2], abs=1e-3)
        assert got[3] == "length"
        assert len(got[1]) == NUM_TOKENS


async def resumes(cluster: Cluster) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{cluster.url}/metrics") as response:
        metrics = await response.text()
    (line,) = [line for line in metrics.splitlines() if line.startswith("tandem_router_resumes_total ")]
    return float(line.split()[1])


async def test_streams_outlive_their_decode_node_token_for_token(tmp_path: Path, small_checkpoint: Path) -> None:
    prompts = prompts_of_lengths([3, 40, 64, 100, 128, 257, 300, 31], seed=23)
    # Half greedy, half sampled with a seed: randomness counts by position.
    sampling: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 1} if i % 2 else {"temperature": 0.8, "seed": i, "logprobs": 1, "top_p": 0.9}
        for i in range(NUM_STREAMS)
    ]
    # A grammar goes on where it was, and so does the search for a stop string that never comes.
    sampling[2] |= {"structured_outputs": {"regex": "[a-f ]{400}"}}
    sampling[3] |= {"structured_outputs": {"regex": "[a-f ]{400}"}, "stop": ["this is not said"]}
    cluster = Cluster(tmp_path, small_checkpoint, both=PLAIN, decode=[{}, {}])
    async with cluster:
        undisturbed = await run_all(cluster.url, prompts, sampling)
        victim = cluster.decode[0]
        disturbed = await run_all(cluster.url, prompts, sampling, kill=victim.kill)
        assert_same(disturbed, undisturbed)
        first = await resumes(cluster)
        assert first >= 1
        victim.start()
        await wait_healthy(victim.url, 60, [victim])
        await cluster.wait_joined()
        # An engine rank dies under its living node, which breaks its streams off before it ends too.
        engine = max(psutil.Process(cluster.decode[1].pid).children(), key=lambda child: child.memory_info().rss)
        assert_same(await run_all(cluster.url, prompts, sampling, kill=engine.kill), undisturbed)
        assert await resumes(cluster) > first
        await cluster.wait_idle()
