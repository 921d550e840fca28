"""Our nodes behind the real vllm-router: its answers equal those through our router, and its traps do not catch us."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.cluster.harness import Cluster, free_port, ranks, wait_healthy
from tests.cluster.vllm_router import VllmRouter

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CLAIM_WAIT_S = 3.0
BOTH: dict[str, Any] = {
    "engine": {"numerics": "plain", "dtype": "float32", "block_size": 32, "max_num_seqs": 8, "num_pages": 64},
    "transfer": {"claim_wait_s": CLAIM_WAIT_S, "connect_timeout_s": 2.0, "read_deadline_s": 2.0},
}
SETTINGS = {"temperature": 0, "ignore_eos": True, "max_tokens": 24, "logprobs": True}
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello to the world, please."}]


def body(path: str, number: int, *, stream: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {**SETTINGS, "stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    if path == CHAT:
        return fields | {"messages": [*HELLO, {"role": "user", "content": f"number {number}"}]}
    return fields | {"prompt": [3 + (7 * number * k) % 800 for k in range(1, 60 + number)], "logprobs": 1}


async def ask(session: aiohttp.ClientSession, url: str, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What of an answer must not depend on the router: all text, all logprobs, the ending and the usage."""
    async with session.post(f"{url}{path}", json=fields) as response:
        raw = await response.read()
        assert response.status == 200, raw
    if not fields["stream"]:
        chunks = [json.loads(raw)]
    else:
        events = [event.removeprefix("data: ") for event in raw.decode().split("\n\n") if event.startswith("data: ")]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
    text, finish, logprobs = "", None, []
    for choice in itertools.chain.from_iterable(chunk["choices"] for chunk in chunks):
        part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        text += part.get("content") or ""
        finish = choice["finish_reason"] or finish
        if choice.get("logprobs"):
            listed = choice["logprobs"]
            logprobs += listed.get("token_logprobs") or [entry["logprob"] for entry in listed["content"]]
    usage = chunks[-1]["usage"]
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {"text": text, "finish": finish, "logprobs": logprobs, "usage": counts}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (got["text"], got["finish"], got["usage"]) == (expected["text"], expected["finish"], expected["usage"])
    assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Cluster, VllmRouter]]:
    """One prefill and one decode node, behind our router and behind vllm-router."""
    directory = tmp_path_factory.mktemp("vllm-router")
    prefill = {"bootstrap_port": free_port(), "node_id": "prefill-a"}
    async with (
        Cluster(directory, small_checkpoint, both=BOTH, prefill=[prefill]) as cluster,
        VllmRouter(directory, cluster.prefill, cluster.decode) as router,
    ):
        yield cluster, router


@pytest_asyncio.fixture(loop_scope="module")
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


async def compare(session: aiohttp.ClientSession, cluster: Cluster, router: VllmRouter, numbers: range) -> None:
    """Every kind of request through both routers."""
    for number in numbers:
        for path, stream in itertools.product((COMPLETIONS, CHAT), (False, True)):
            fields = body(path, number, stream=stream)
            got, expected = await asyncio.gather(
                ask(session, router.url, path, fields), ask(session, cluster.url, path, fields)
            )
            assert_same(got, expected)
            assert expected["usage"]["completion_tokens"] == SETTINGS["max_tokens"]


async def until_metric(session: aiohttp.ClientSession, url: str, name: str, *, least: float) -> None:
    """Nodes report about their transfers a moment later."""
    deadline = time.monotonic() + 30
    while True:
        async with session.get(f"{url}/metrics") as response:
            lines = (await response.text()).splitlines()
        if sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{")) >= least:
            return
        assert time.monotonic() < deadline, [line for line in lines if line.startswith(name)]
        await asyncio.sleep(0.1)


async def totals(cluster: Cluster) -> tuple[int, int, int]:
    (decode,) = await ranks(cluster.decode[0].url)
    return decode["transfers_received"], decode["transfers_failed"], decode["recomputed"]


@pytest.mark.asyncio(loop_scope="module")
async def test_its_answers_equal_those_through_our_router(
    pair: tuple[Cluster, VllmRouter], session: aiohttp.ClientSession
) -> None:
    cluster, router = pair
    before = await totals(cluster)
    await compare(session, cluster, router, range(2))
    await cluster.wait_idle()
    after = await totals(cluster)
    assert after[0] - before[0] >= 16, "every prompt was handed over"
    assert after[1:] == before[1:] == (0, 0)
    await until_metric(session, cluster.decode[0].url, "tandem_transfer_reads_total", least=16)
    await until_metric(session, cluster.prefill[0].url, "tandem_transfer_peers", least=1)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prefill_node_restarts_under_its_name_and_it_goes_on(
    pair: tuple[Cluster, VllmRouter], session: aiohttp.ClientSession
) -> None:
    cluster, router = pair
    node = cluster.prefill[0]
    before = await totals(cluster)
    assert await asyncio.to_thread(node.stop) == 0
    node.start()
    await wait_healthy(node.url, 60, [node])
    await cluster.wait_joined()
    await compare(session, cluster, router, range(10, 11))
    received, failed, recomputed = await totals(cluster)
    assert (failed, recomputed) == (0, 0)
    assert received - before[0] >= 8, "the restarted node hands over, nothing is computed twice"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_state_that_nobody_has_is_waited_for_no_longer_than_configured(
    pair: tuple[Cluster, VllmRouter], session: aiohttp.ClientSession
) -> None:
    cluster, _ = pair
    bootstrap = f"http://127.0.0.1:{cluster.prefill[0].config['bootstrap_port']}"
    for engine_id in ("prefill-a", "prefill-of-yesterday"):
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": f"xfer-never-made-{engine_id}",
            "remote_bootstrap_addr": bootstrap,
            "remote_engine_id": engine_id,
        }
        fields = body(COMPLETIONS, 5, stream=False)
        began = time.monotonic()
        url = f"{cluster.decode[0].url}{COMPLETIONS}"
        async with session.post(url, json=fields | {"kv_transfer_params": params}) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (500, "transfer_failed")
        assert time.monotonic() - began < CLAIM_WAIT_S + 20
    await cluster.wait_idle()


@pytest.mark.asyncio(loop_scope="module")
async def test_nodes_that_die_keep_nobody_waiting(
    pair: tuple[Cluster, VllmRouter], session: aiohttp.ClientSession
) -> None:
    cluster, router = pair
    fields = body(COMPLETIONS, 6, stream=False) | {"max_tokens": 400}
    for victim in (cluster.decode[0], cluster.prefill[0]):

        async def attempt() -> int:
            async with session.post(f"{router.url}{COMPLETIONS}", json=fields) as response:
                await response.read()
                return response.status

        running = [asyncio.create_task(attempt()) for _ in range(4)]
        await asyncio.sleep(0.05)
        victim.kill()
        # With the node dead a request ends at once; the limit only tells this from waiting for a transfer for ever.
        statuses = await asyncio.wait_for(asyncio.gather(*running, attempt()), 30)
        assert statuses[-1] >= 500
        victim.start()
        await wait_healthy(victim.url, 60, [victim])
    # Both nodes are new ones under their old names now.
    await cluster.wait_joined()
    await compare(session, cluster, router, range(20, 21))
    await cluster.wait_idle()


async def test_four_ranks_behind_it_each_get_their_share(tmp_path: Path, small_checkpoint: Path) -> None:
    small = {"engine": {"max_num_seqs": 4, "num_pages": 32}}
    cluster = Cluster(
        tmp_path,
        small_checkpoint,
        both=BOTH,
        prefill=[{"bootstrap_port": free_port(), "node_id": "prefill-b"}],
        decode=[small | {"data_parallel_size": 4}],
    )
    async with (
        cluster,
        VllmRouter(tmp_path, cluster.prefill, cluster.decode) as router,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
    ):
        before = [rank["transfers_received"] for rank in await ranks(cluster.decode[0].url)]
        requests = [body(path, number, stream=True) for number in range(4) for path in (COMPLETIONS, CHAT)]
        for url in (router.url, cluster.url):
            answers = await asyncio.gather(
                *(ask(session, url, CHAT if "messages" in fields else COMPLETIONS, fields) for fields in requests)
            )
            if url == router.url:
                first = answers
                await cluster.wait_idle()
                received = [rank["transfers_received"] for rank in await ranks(cluster.decode[0].url)]
                # Two each, and whatever our own router tried meanwhile.
                assert all(now - then >= 2 for now, then in zip(received, before, strict=True)), (before, received)
        for got, expected in zip(first, answers, strict=True):
            assert_same(got, expected)
        assert all(rank["recomputed"] == 0 for rank in await ranks(cluster.decode[0].url))
