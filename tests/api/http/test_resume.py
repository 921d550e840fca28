"""A stream that broke anywhere goes on on another node, byte for byte; and what a router is told so that it can."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from api.resume import ASK_HEADER, CREATED_HEADER, note, read_notes
from runtime.requests import RequestFailed
from tests.api.http.conftest import Server

COMPLETIONS, CHAT, MESSAGES, GENERATE = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/messages",
    "/inference/v1/generate",
)
HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
CALLS = (
    'Let me see.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="true">x "y" é</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


async def chunks(server: Server, path: str, body: dict[str, Any], **headers: str) -> AsyncIterator[tuple[bytes, bytes]]:
    """(extensions, data) of every HTTP chunk of the answer; first of all (b"", its head)."""
    parts = urlsplit(server.base_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    raw = json.dumps(body).encode()
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\n{lines}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    try:
        yield b"", await reader.readuntil(b"\r\n\r\n")
        while True:
            size, semicolon, rest = (await reader.readuntil(b"\r\n"))[:-2].partition(b";")
            if size == b"0":
                return
            yield semicolon + rest, (await reader.readexactly(int(size, 16) + 2))[:-2]
    finally:
        writer.close()


def comparable(data: bytes) -> bytes:
    """Ids of tool calls are made up when the call begins and never repeated."""
    return re.sub(rb"call_[0-9a-f]{24}", b"call", data)


CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "completion": (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 9}, None),
    "with logprobs": (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 6, "logprobs": 2, "return_token_ids": True}, None),
    "echo": (COMPLETIONS, {"prompt": "ab", "max_tokens": 5, "echo": True, "logprobs": 1}, None),
    "stop string": (COMPLETIONS, {"prompt": [5], "max_tokens": 40, "stop": ["gone!"]}, "go going gone? gone! more"),
    "characters of several tokens": (COMPLETIONS, {"prompt": [5], "max_tokens": 40}, "naïve 日本 🙂 ok"),
    "usage": (
        COMPLETIONS,
        {"prompt": [5], "max_tokens": 6, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        None,
    ),
    "thinking": (
        CHAT,
        {"messages": HI, "max_tokens": 60, "chat_template_kwargs": {"thinking": True}},
        "Hm, well.</think>An answer.",
    ),
    "tool call": (CHAT, {"messages": HI, "max_tokens": 200, "tools": [TOOL]}, CALLS),
    "chat with logprobs": (CHAT, {"messages": HI, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}, None),
    "messages": (
        MESSAGES,
        {"messages": HI, "max_tokens": 200, "tools": [{"name": "f", "input_schema": TOOL["function"]["parameters"]}]},  # type: ignore[index]
        CALLS,
    ),
    "token ids": (
        GENERATE,
        {"token_ids": [5, 6], "sampling_params": {"max_tokens": 6, "logprobs": 1, "seed": 1}},
        None,
    ),
}


@pytest.mark.parametrize(("path", "body", "script"), CASES.values(), ids=CASES.keys())
async def test_a_stream_cut_after_any_chunk_goes_on_where_it_broke(
    serve: Any, path: str, body: dict[str, Any], script: str | None
) -> None:
    server = await serve(step_s=0.001)
    asked = {"x_request_id": "same", ASK_HEADER: "1"}

    async def run(**extra: Any) -> list[tuple[bytes, bytes]]:
        if script is not None:
            server.engine.script(script)
        return [chunk async for chunk in chunks(server, path, body | {"stream": True, "seed": 1} | extra, **asked)]

    (_, head), *whole = await run()
    created = int(re.search(rb"(?i)%b: (\d+)" % CREATED_HEADER.encode(), head)[1])  # type: ignore[index]
    expected = comparable(b"".join(data for _, data in whole))
    for cut in range(1, len(whole), 1 + len(whole) // 40):
        ids, ended = read_notes(b"".join(extension for extension, _ in whole[:cut]))
        assert not ended
        resume = {"token_ids": ids, "created": created}
        _, *rest = await run(kv_transfer_params={"resume": resume})
        joined = b"".join(data for _, data in (*whole[:cut], *rest))
        assert comparable(joined) == expected, f"cut after chunk {cut} of {len(whole)}, {len(ids)} tokens"
        more, ended = read_notes(b"".join(extension for extension, _ in rest))
        assert ended
        assert ids + more == read_notes(b"".join(extension for extension, _ in whole))[0]
    assert len(whole) > 3


async def test_who_does_not_ask_gets_no_notes(serve: Any) -> None:
    server = await serve()
    body = {"prompt": [5], "max_tokens": 4, "stream": True}
    assert not any([extension async for extension, _ in chunks(server, COMPLETIONS, body)])


async def test_a_failing_engine_breaks_a_noted_stream_off_instead_of_ending_it(serve: Any) -> None:
    server = await serve(step_s=0.001)
    for kind, breaks in (("internal", True), ("invalid", False)):
        server.engine.fail_next = RequestFailed(request_id="", kind=kind, message="no")
        server.engine.fail_after = 2
        body = {"prompt": [5], "max_tokens": 9, "stream": True}
        seen = b""
        try:
            async for _, data in chunks(server, COMPLETIONS, body, **{ASK_HEADER: "1"}):
                seen += data
            assert not breaks
            assert b'"error"' in seen
        except (asyncio.IncompleteReadError, ConnectionError):
            assert breaks
            assert b"error" not in seen


async def test_a_prefill_leg_of_a_resumed_stream_computes_one_token_more(serve: Any) -> None:
    server = await serve(role="prefill")
    params = {"do_remote_decode": True, "transfer_id": "ab", "resume": {"token_ids": [5, 6, 7]}, "min_tokens": 9}
    body = {"prompt": [4], "max_tokens": 20, "min_tokens": 9, "stream": True, "kv_transfer_params": params}
    await server.post_json(COMPLETIONS, body)
    (submit,) = server.engine.submitted
    assert submit.generated_ids == (5, 6, 7)
    assert submit.sampling.max_tokens == submit.sampling.min_tokens == 4


async def test_resuming_counts_as_usage_but_not_as_this_nodes_work(serve: Any) -> None:
    server = await serve()
    params = {"resume": {"token_ids": [5, 6, 7]}}
    answer = await server.post_json(COMPLETIONS, {"prompt": [4], "max_tokens": 10, "kv_transfer_params": params})
    assert answer["usage"]["completion_tokens"] == 10
    metrics = await (await server.get("/metrics")).text()
    assert 'tandem_request_generation_tokens_sum{engine="0",model_name="tiny"} 7.0' in metrics


@pytest.mark.parametrize(("fields", "ids"), [({"n": 2}, [5]), ({"prompt": [[4], [5]]}, [5]), ({}, [10**7]), ({}, [-1])])
async def test_what_cannot_be_resumed_is_refused(serve: Any, fields: dict[str, Any], ids: list[int]) -> None:
    server = await serve()
    body = {"prompt": [4], "kv_transfer_params": {"resume": {"token_ids": ids}}} | fields
    await server.post_json(COMPLETIONS, body, status=400)
    assert server.engine.submitted == []


def test_notes_are_read_as_they_were_written() -> None:
    assert read_notes(note([1, 22]) + note([]) + note([3], last=True)) == ([1, 22, 3], True)
    assert read_notes(b"") == ([], False)
    for wrong in (b";t=", b";t=1,2", b";x", b";t=1.2.a"):
        with pytest.raises(ValueError, match=r"."):
            read_notes(wrong)
