"""A node with two API processes behind one port: it is one server to everybody."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from api.response_ids import process_of
from tests.cluster.harness import Program, standalone, wait_idle

TWO: dict[str, Any] = {
    "api_processes": 2,
    "drain_timeout_s": 30.0,
    "api": {"enable_admin": True},
    "engine": {"numerics": "plain", "dtype": "float32"},
}


@asynccontextmanager
async def fresh(node: Program) -> AsyncIterator[aiohttp.ClientSession]:
    """A client whose every request opens a connection, and so lands on any of the processes."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(node.url, timeout=aiohttp.ClientTimeout(total=60), connector=connector) as session:
        yield session


async def stream(
    session: aiohttp.ClientSession,
    max_tokens: int,
    leave_after: int | None = None,
    begun: asyncio.Event | None = None,
) -> str:
    """The text of a greedy completion, or its beginning if the client leaves. `begun` is set by its first token."""
    body = {"prompt": "a", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    text, count = "", 0
    async with session.post("/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            count += 1
            if begun is not None:
                begun.set()
            if count == leave_after:
                break
    return text


async def respond(session: aiohttp.ClientSession, **fields: Any) -> dict[str, Any]:
    body = {"input": "hi", "max_output_tokens": 4, "reasoning": {"effort": "none"}, **fields}
    async with session.post("/v1/responses", json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
    return answer


async def follow(session: aiohttp.ClientSession, previous: str, *, leave: bool) -> list[str]:
    """The names of the events of a streamed follow-up, or of its beginning if the client leaves.

    The body is compressed, which only the process that reads it first can know.
    """
    body = {"input": "and", "previous_response_id": previous, "stream": True, "reasoning": {"effort": "none"}}
    names = []
    body["max_output_tokens"] = 4000 if leave else 4
    async with session.post("/v1/responses", json=body, compress="gzip") as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"event: "):
                names.append(line[7:].decode().strip())
                if leave and len(names) == 4:
                    break
    return names


async def samples(session: aiohttp.ClientSession) -> dict[tuple[str, str], float]:
    """Sums of (series, path or reason) over all other labels."""
    async with session.get("/metrics") as response:
        text = await response.text()
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, sample.labels.get("handler", sample.labels.get("finished_reason", "")))
            sums[key] = sums.get(key, 0.0) + sample.value
    return sums


async def until_load(session: aiohttp.ClientSession, load: int) -> None:
    async with asyncio.timeout(30):
        while True:
            async with session.get("/load") as response:
                if (await response.json())["server_load"] == load:
                    return
            await asyncio.sleep(0.02)


async def exit_code(program: Program) -> int | None:
    async with asyncio.timeout(60):
        while program.exit_code is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return program.exit_code


def other_api_process(node: Program) -> psutil.Process:
    """The child that listens where the node does."""
    for child in psutil.Process(node.pid).children():
        ports = [place.laddr.port for place in child.net_connections("tcp") if place.status == psutil.CONN_LISTEN]
        if node.config["port"] in ports:
            return child
    raise AssertionError("no other process listens on the node's port")


async def end_in_order(node: Program, session: aiohttp.ClientSession) -> None:
    """A signal to every process at once lets the streams of both finish, and then all processes end."""
    family = psutil.Process(node.pid).children(recursive=True)
    whole = await stream(session, 40)
    begun = [asyncio.Event() for _ in range(8)]
    running = [asyncio.create_task(stream(session, 40, begun=event)) for event in begun]
    for event in begun:
        await event.wait()
    other_api_process(node).send_signal(signal.SIGTERM)
    psutil.Process(node.pid).send_signal(signal.SIGTERM)
    assert await asyncio.gather(*running) == [whole] * 8
    assert await exit_code(node) == 0, node.log()
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, 30)
    assert not alive


async def test_two_processes_are_one_server(tmp_path: Path, small_checkpoint: Path) -> None:
    async with standalone(tmp_path, small_checkpoint, TWO) as node, fresh(node) as session:
        # Both serve, once both have opened the port, and whoever is asked finds every response.
        num_asked, answers = 0, list[dict[str, Any]]()
        async with asyncio.timeout(60):
            while {process_of(answer["id"]) for answer in answers} != {0, 1}:
                answers = await asyncio.gather(*(respond(session) for _ in range(24)))
                num_asked += 24
        for answer in answers:
            async with session.get(f"/v1/responses/{answer['id']}") as response:
                assert (await response.json())["id"] == answer["id"]
        async with session.delete(f"/v1/responses/{answers[0]['id']}") as response:
            assert response.status == 200
        followed = await asyncio.gather(
            *(respond(session, previous_response_id=answer["id"]) for answer in answers[1:9])
        )
        for answer, follow_up in zip(answers[1:9], followed, strict=True):
            assert process_of(follow_up["id"]) == process_of(answer["id"])
            assert follow_up["usage"]["input_tokens"] > answer["usage"]["input_tokens"]
        for answer in answers[1:5]:
            quote = {"type": "item_reference", "id": answer["output"][0]["id"]}
            quoting = await respond(session, input=[quote, {"role": "user", "content": "and"}])
            assert process_of(quoting["id"]) == process_of(answer["id"])
        async with session.post("/v1/responses", json={"input": "x", "previous_response_id": answers[0]["id"]}) as gone:
            assert gone.status == 404

        # A forwarded answer streams like any other, and a client that leaves it ends it.
        events = await asyncio.gather(
            *(follow(session, answer["id"], leave=n % 2 == 1) for n, answer in enumerate(answers[1:7]))
        )
        assert all(names[0] == "response.created" for names in events)
        assert all(names[-1] == "response.incomplete" for names in events[::2])
        await wait_idle(node.url)

        # Streams of both, some of which are left by their clients.
        whole = await stream(session, 12)
        leaves = [n % 3 == 0 for n in range(12)]
        texts = await asyncio.gather(
            *(stream(session, 3000 if left else 12, leave_after=3 if left else None) for left in leaves)
        )
        assert all(whole.startswith(text) if left else text == whole for text, left in zip(texts, leaves, strict=True))
        await wait_idle(node.url)

        # The node's own affairs are answered everywhere.
        for _ in range(6):
            async with session.get("/cluster/node") as response:
                assert (await response.json())["http_url"] == node.url
            async with session.get("/load") as response:
                assert await response.json() == {"server_load": 0}

        # Metrics are those of the node.
        counted = [await samples(session) for _ in range(6)]
        finished = "tandem_request_success_total"
        assert {c[finished, "length"] + c[finished, "stop"] for c in counted} == {num_asked + 8 + 4 + 3 + 9}
        assert {c[finished, "abort"] for c in counted} == {3 + 4}
        assert {c["tandem_http_requests_total", "/v1/responses"] for c in counted} == {num_asked + 8 + 4 + 1 + 6}
        assert [c.get(("tandem_http_requests_total", "/metrics"), 0) for c in counted] == [*range(6)]
        assert {c["tandem_slots", ""] for c in counted} == {c["vllm:slots", ""] for c in counted}
        assert {c["tandem_e2e_request_latency_seconds_count", ""] for c in counted} == {num_asked + 8 + 4 + 6 + 9 + 4}

        # The port is theirs, though sockets that share one are not refused by the kernel.
        second = Program(tmp_path, "second", "decode_node", node.config)
        second.start()
        assert await exit_code(second) == 1
        assert f"cannot listen on 127.0.0.1:{node.config['port']}" in second.log()

        # An operator aborts in both.
        running = [asyncio.create_task(stream(session, 1500)) for _ in range(8)]
        await until_load(session, 8)
        async with session.post("/abort_requests", json={}) as response:
            assert len((await response.json())["aborted"]) == 8
        results = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(result, AssertionError) for result in results)
        await wait_idle(node.url)
        await end_in_order(node, session)


async def test_a_dead_api_process_ends_the_node_and_says_so(tmp_path: Path, small_checkpoint: Path) -> None:
    async with standalone(tmp_path, small_checkpoint, TWO) as node, fresh(node) as session:
        running = [asyncio.create_task(stream(session, 5000)) for _ in range(8)]
        await until_load(session, 8)
        other_api_process(node).kill()
        results = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(result, AssertionError | aiohttp.ClientError) for result in results)
        assert await exit_code(node) == 1
        assert node.log().rstrip().endswith("error: API process 1 ended with exit code -9")
