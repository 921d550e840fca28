"""A client that goes away cancels its request, wherever it is; a request that fails says so."""

import asyncio
import json
import random
from typing import Any

import pytest

from api.settings import ApiSettings
from runtime.requests import RequestFailed
from tests.api.http.conftest import Server
from tests.api.http.events import parse_events

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


async def raw_request(
    server: Server, path: str, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A socket of our own with one request written to it."""
    host, port = server.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_leaving_in_the_middle_aborts_every_choice(serve: Any, path: str, stream: bool) -> None:
    server = await serve(step_s=0.01)
    body = {"messages": HI, "prompt": "a", "n": 3, "max_tokens": 1000, "stream": stream}
    reader, writer = await raw_request(server, path, body)
    await until(lambda: server.engine.num_running == 3)
    if stream:
        await reader.readuntil(b"data: ")
    writer.close()
    await until(lambda: server.engine.num_running == 0)
    assert sorted(server.engine.aborted) == sorted(submit.request_id for submit in server.engine.submitted)


async def test_leaving_before_the_first_token_aborts(serve: Any) -> None:
    server = await serve(step_s=30.0)
    _, writer = await raw_request(server, CHAT, {"messages": HI, "stream": True})
    await until(lambda: server.engine.num_running == 1)
    writer.close()
    await until(lambda: server.engine.num_running == 0, timeout_s=1.0)


async def test_two_hundred_clients_that_leave_at_random_points_leave_nothing_behind(serve: Any) -> None:
    server = await serve(step_s=0.002)
    dice = random.Random(7)

    async def client() -> None:
        body = {"messages": HI, "prompt": "a", "max_tokens": 30, "stream": dice.random() < 0.7}
        reader, writer = await raw_request(server, dice.choice([CHAT, COMPLETIONS]), body)
        try:
            async with asyncio.timeout(dice.random() * 0.15):
                await reader.read()
        except TimeoutError:
            pass
        writer.close()

    for _ in range(10):
        await asyncio.gather(*(client() for _ in range(20)))
    await until(lambda: server.engine.num_running == 0)
    load = await server.get("/load")
    assert await load.json() == {"server_load": 0}
    await server.post_json(CHAT, {"messages": HI, "max_tokens": 3})


async def test_a_failure_before_the_first_token_has_its_own_status(server: Server) -> None:
    for kind, status in (("invalid", 400), ("overloaded", 503), ("transfer", 500), ("internal", 500)):
        for stream in (False, True):
            server.engine.fail_next = RequestFailed(request_id="", kind=kind, message=f"went wrong: {kind}")
            response = await server.post(CHAT, {"messages": HI, "stream": stream})
            assert response.status == status
            error = (await response.json())["error"]
            assert ("went wrong" in error["message"]) == (status < 500 or status == 503)
            assert ("Retry-After" in response.headers) == (status == 503)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_failure_in_the_middle_of_a_stream_is_an_event_and_an_end(server: Server, path: str) -> None:
    server.engine.fail_next = RequestFailed(request_id="", kind="transfer", message="10.0.0.1:99 is gone")
    server.engine.fail_after = 3
    response = await server.post(path, {"messages": HI, "prompt": "a", "stream": True, "max_tokens": 50})
    assert response.status == 200
    raw = await response.read()
    frames = [data for _, data in parse_events(raw)]
    assert frames[-1] == "[DONE]"
    error = json.loads(frames[-2])["error"]
    assert error["code"] == "transfer_failed"
    assert b"10.0.0.1" not in raw
    assert server.engine.num_running == 0


async def test_a_dead_engine_answers_500_and_health_503(server: Server) -> None:
    server.engine.trouble = "rank 0 ended with code -9"
    assert (await server.post(CHAT, {"messages": HI})).status == 500
    health = await server.get("/health")
    assert health.status == 503
    assert "rank 0" in (await health.json())["error"]["message"]


async def test_a_silent_stream_is_kept_alive(serve: Any) -> None:
    server = await serve(ApiSettings(keepalive_s=0.05), step_s=0.3)
    response = await server.post(CHAT, {"messages": HI, "stream": True, "max_tokens": 2})
    raw = await response.read()
    assert raw.count(b": keep-alive\n\n") >= 4
    assert raw.endswith(b"data: [DONE]\n\n")
    role = raw.index(b'"role":"assistant"')
    assert raw.index(b": keep-alive") > role or raw.startswith(b": keep-alive")


async def test_requests_beyond_the_bound_are_told_to_come_back(serve: Any) -> None:
    server = await serve(ApiSettings(max_concurrent_requests=2), step_s=5.0)
    writers = [(await raw_request(server, CHAT, {"messages": HI}))[1] for _ in range(2)]
    await until(lambda: server.engine.num_running == 2)
    response = await server.post(CHAT, {"messages": HI})
    assert response.status == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert (await response.json())["error"]["type"] == "ServiceUnavailableError"
    for writer in writers:
        writer.close()
    await until(lambda: server.engine.num_running == 0)


async def test_a_reader_that_stops_reading_does_not_stop_the_others(serve: Any) -> None:
    server = await serve(ApiSettings(), step_s=0.0, tokens_per_step=50)
    _, slow = await raw_request(
        server, COMPLETIONS, {"prompt": "a", "max_tokens": 4000, "stream": True, "logprobs": 20}
    )
    await until(lambda: len(server.engine.submitted) == 1)
    async with asyncio.timeout(5.0):
        for _ in range(20):
            await server.post_json(COMPLETIONS, {"prompt": "a", "max_tokens": 50})
    slow.close()
    await until(lambda: server.engine.num_running == 0)


async def test_a_reader_that_falls_far_behind_misses_nothing(serve: Any) -> None:
    server = await serve(ApiSettings(), step_s=0.0, tokens_per_step=20)
    body = {"prompt": "a", "max_tokens": 4000, "temperature": 0, "logprobs": 20}
    whole = await server.post_json(COMPLETIONS, body)
    reader, writer = await raw_request(server, COMPLETIONS, {**body, "stream": True})
    await reader.readuntil(b"data: ")
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: server.engine.num_running == 0, timeout_s=30.0)
    reader._transport.resume_reading()  # type: ignore[attr-defined]
    raw = b"data: "
    async with asyncio.timeout(30.0):
        while not raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            raw += await reader.read(1 << 20)
    writer.close()
    frames = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(frame["choices"][0]["text"] for frame in frames) == whole["choices"][0]["text"]
