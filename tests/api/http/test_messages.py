"""Anthropic's Messages API: its vectors, its errors, and the official client."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from api.settings import ApiSettings
from runtime.requests import RequestFailed
from tests.api.http.conftest import Server
from tests.api.http.events import parse_events
from tests.api.http.test_chat import WEATHER, calls

PATH = "/v1/messages"
VECTOR_DIR = Path(__file__).parents[1] / "vectors"
VECTORS = json.loads((VECTOR_DIR / "api-messages.json").read_text())["vectors"]
DECISIONS = json.loads((VECTOR_DIR / "decisions.json").read_text()).get("api-messages.json", {})
REQUESTS = [vector for vector in VECTORS if "/request/" in vector["name"]]
OUTPUTS = [vector for vector in VECTORS if "/output/" in vector["name"]]
HI = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {
        "name": "get_weather",
        "description": "d",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    }
]


def names(vectors: list[dict[str, Any]]) -> list[str]:
    return [vector["name"] for vector in vectors]


@pytest.mark.parametrize("vector", REQUESTS, ids=names(REQUESTS))
async def test_request_vectors(serve: Any, vector: dict[str, Any]) -> None:
    server = await serve(ApiSettings(reasoning_effort_profile="0731"))
    expected = {**vector["expected"], **DECISIONS.get(vector["name"], {})}
    response = await server.post(PATH, vector["input"])
    answer = await response.json()
    if "error" in expected:
        assert response.status == expected["error"]["status"]
        assert answer["type"] == "error"
        assert answer["error"]["type"] == "invalid_request_error"
        return
    assert response.status == 200, answer
    submit = server.engine.submitted[0]
    assert server.engine.tokenizer.decode(submit.prompt_ids, skip_special=False) == expected["prompt"]
    assert submit.sampling.max_tokens == expected["max_tokens"]


def merged(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events with neighbouring deltas of one kind joined, and without ids and counts."""
    result: list[dict[str, Any]] = []
    text_key = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}
    for event in json.loads(json.dumps(events)):
        if event["type"] == "content_block_delta":
            key = text_key.get(event["delta"]["type"])
            last = result[-1]
            if key and last["type"] == event["type"] and last["delta"]["type"] == event["delta"]["type"]:
                last["delta"][key] += event["delta"][key]
                continue
            if event["delta"]["type"] == "signature_delta":
                event["delta"]["signature"] = "ID"
        if event["type"] == "message_start":
            event["message"] = anonymous(event["message"])
        if event["type"] == "content_block_start" and "id" in event["content_block"]:
            event["content_block"]["id"] = "ID"
        if "usage" in event:
            event["usage"] = sorted(event["usage"])
        result.append(event)
    return result


def anonymous(message: dict[str, Any]) -> dict[str, Any]:
    message = json.loads(json.dumps(message))
    message |= {"id": "ID", "model": "m", "usage": sorted(message["usage"])}
    for block in message["content"]:
        block |= {key: "ID" for key in ("id", "signature") if key in block}
    return message


@pytest.mark.parametrize("tokens_per_step", [1, 4, 1000])
@pytest.mark.parametrize("vector", OUTPUTS, ids=names(OUTPUTS))
async def test_output_vectors(serve: Any, vector: dict[str, Any], tokens_per_step: int) -> None:
    server = await serve(tokens_per_step=tokens_per_step)
    server.engine.cached_tokens = 2
    body = {"messages": HI, "max_tokens": 500, "tools": [{"name": "f", "input_schema": {}}]}
    text = "".join(vector["input"]["chunks"])
    server.engine.script(text)
    response = await server.post(PATH, {**body, "stream": True})
    frames = parse_events(await response.read())
    events = [json.loads(data) for _, data in frames]
    assert [name for name, _ in frames] == [event["type"] for event in events]
    assert merged(events) == merged([event["data"] for event in vector["expected"]["events"]])
    server.engine.script(text)
    whole = await server.post_json(PATH, body)
    assert anonymous(whole) == anonymous(vector["expected"]["message"])
    prompt = len(server.engine.submitted[0].prompt_ids)
    usage = {"input_tokens": prompt - 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2,
             "service_tier": "standard"}  # fmt: skip
    completion = len(server.engine.tokenizer.encode(text)) + 1
    assert whole["usage"] == {**usage, "output_tokens": completion}
    assert events[0]["message"]["usage"] == {**usage, "output_tokens": 0}
    assert events[-2]["usage"] == whole["usage"]


@pytest.fixture
async def client(server: Server) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.base_url, api_key="EMPTY", max_retries=0) as client:
        yield client


async def test_the_official_client_streams(server: Server, client: anthropic.AsyncAnthropic) -> None:
    server.engine.script("Thought.</think>Answer.")
    async with client.messages.stream(model="tiny", max_tokens=100, messages=HI) as stream:  # type: ignore[arg-type]
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == "Answer."
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == len(server.engine.tokenizer.encode("Thought.</think>Answer.")) + 1


async def test_a_tool_conversation_goes_round(server: Server, client: anthropic.AsyncAnthropic) -> None:
    server.engine.script("T</think>Let me see." + calls(WEATHER))
    messages: list[Any] = list(HI)
    first = await client.messages.create(model="tiny", max_tokens=500, messages=messages, tools=TOOLS)
    assert first.stop_reason == "tool_use"
    use = first.content[-1]
    assert use.type == "tool_use"
    assert (use.name, use.input) == ("get_weather", {"city": "Paris", "days": 3})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "sunny"}]}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    server.engine.script("D</think>It is sunny.")
    second = await client.messages.create(model="tiny", max_tokens=500, messages=messages, tools=TOOLS)
    assert second.content[-1].type == "text"
    assert second.content[-1].text == "It is sunny."
    prompt = server.engine.tokenizer.decode(server.engine.submitted[1].prompt_ids)
    assert "<think>T</think>Let me see." + calls(WEATHER) in prompt
    assert "<tool_result>sunny</tool_result>" in prompt


async def test_stop_sequences_and_lengths_have_their_reasons(server: Server) -> None:
    for script, fields, reason, sequence in (
        ("</think>a STOP b", {"stop_sequences": ["STOP"]}, "stop_sequence", "STOP"),
        ("</think>abcdef", {"max_tokens": 3}, "max_tokens", None),
        ("</think>abc", {}, "end_turn", None),
    ):
        server.engine.script(script)
        answer = await server.post_json(PATH, {"messages": HI, "max_tokens": 100, **fields})
        assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


@pytest.mark.parametrize(
    ("script", "kinds"),
    [
        ("</think>A", ["thinking", "text"]),
        ("</think>" + calls(WEATHER), ["thinking", "tool_use"]),
        ("\n</think>\n", ["thinking"]),
        ("", ["thinking"]),
    ],
)
async def test_an_answer_with_thinking_begins_with_its_block_even_if_nothing_was_thought(
    server: Server, client: anthropic.AsyncAnthropic, script: str, kinds: list[str]
) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 500, "messages": HI, "tools": TOOLS}
    server.engine.script(script)
    whole = await client.messages.create(**asked)
    server.engine.script(script)
    async with client.messages.stream(**asked) as stream:
        final = await stream.get_final_message()
    for message in (whole, final):
        assert [block.type for block in message.content] == kinds
        assert message.content[0].thinking == ""  # type: ignore[union-attr]


async def test_a_call_that_was_cut_short_has_no_input(server: Server) -> None:
    cut = calls(WEATHER)[:-60]
    server.engine.script("T</think>" + cut)
    num_tokens = len(server.engine.tokenizer.encode("T</think>" + cut))
    answer = await server.post_json(PATH, {"messages": HI, "max_tokens": num_tokens, "tools": TOOLS})
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"][-1]["input"] == {}


async def test_a_trailing_assistant_message_is_the_beginning_of_the_answer(server: Server) -> None:
    server.engine.script(" world")
    messages = [*HI, {"role": "assistant", "content": "Hello"}]
    body = {"messages": messages, "max_tokens": 50, "thinking": {"type": "disabled"}}
    answer = await server.post_json(PATH, body)
    prompt = server.engine.tokenizer.decode(server.engine.submitted[0].prompt_ids)
    assert prompt.endswith("<｜Assistant｜></think>Hello")
    assert answer["content"] == [{"type": "text", "text": " world"}]


async def test_a_line_that_changes_with_every_request_is_left_out_of_the_prompt(server: Server) -> None:
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=123"},
        {"type": "text", "text": "You are kind.", "cache_control": {"type": "ephemeral"}},
    ]
    await server.post_json(PATH, {"messages": HI, "max_tokens": 1, "system": system})
    prompt = server.engine.tokenizer.decode(server.engine.submitted[0].prompt_ids)
    assert prompt.startswith("<｜begin▁of▁sentence｜>You are kind.<｜User｜>") or "You are kind.<｜User｜>" in prompt
    assert "billing" not in prompt


async def test_what_the_system_says_in_the_middle_stays_there(server: Server) -> None:
    messages = [*HI, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
    await server.post_json(PATH, {"messages": messages, "max_tokens": 1, "thinking": {"type": "disabled"}})
    prompt = server.engine.tokenizer.decode(server.engine.submitted[0].prompt_ids, skip_special=False)
    reminder = "<system-reminder>\nBe brief.\n</system-reminder>"
    assert prompt == f"<｜begin▁of▁sentence｜><｜User｜>hi\n\n{reminder}\n\ngo<｜Assistant｜></think>"


async def test_tokens_are_counted_as_they_are_generated_from(server: Server, client: anthropic.AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(model="tiny", messages=HI, tools=TOOLS, system="S")  # type: ignore[arg-type]
    await client.messages.create(model="tiny", max_tokens=1, messages=HI, tools=TOOLS, system="S")  # type: ignore[arg-type]
    assert counted.input_tokens == len(server.engine.submitted[0].prompt_ids)


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "claude"}, 404, "not_found_error", "claude"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_request_error", "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0.type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, 400, "invalid_request_error", "budget_tokens"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice"),
        ({"output_config": {"effort": "turbo"}}, 400, "invalid_request_error", "output_config"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "invalid_request_error", "messages.0.content"),
        ({"thread": {"type": "create"}}, 400, "invalid_request_error", "thread"),
        (
            {
                "system": "S",
                "messages": [
                    *HI,
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]},
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "b"}]},
                ],
            },
            400,
            "invalid_request_error",
            "messages.3: ",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": 5}}}},
            400,
            "invalid_request_error",
            "output_config.format",
        ),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, 400, "invalid_request_error", "tools.0.name"),
    ],
)
async def test_errors_have_anthropics_shape(
    server: Server, fields: dict[str, Any], status: int, kind: str, words: str
) -> None:
    body = {"messages": HI, "max_tokens": 5, **fields}
    answer = await server.post_json(PATH, body, status=status)
    assert set(answer) == {"type", "error"}
    assert answer["type"] == "error"
    assert answer["error"]["type"] == kind
    assert words in answer["error"]["message"]
    assert server.engine.submitted == []


async def test_the_client_raises_what_ends_a_stream(server: Server, client: anthropic.AsyncAnthropic) -> None:
    server.engine.fail_next = RequestFailed(request_id="", kind="internal", message="x")
    server.engine.fail_after = 2

    async def read() -> None:
        async with client.messages.stream(model="tiny", max_tokens=100, messages=HI) as stream:  # type: ignore[arg-type]
            async for _ in stream:
                pass

    with pytest.raises(anthropic.APIError):
        await read()


async def test_x_api_key_opens_messages(serve: Any) -> None:
    server = await serve(ApiSettings(api_keys=("right",)))
    async with anthropic.AsyncAnthropic(base_url=server.base_url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(model="tiny", max_tokens=1, messages=HI)  # type: ignore[arg-type]
    async with anthropic.AsyncAnthropic(base_url=server.base_url, api_key="right", max_retries=0) as client:
        await client.messages.create(model="tiny", max_tokens=1, messages=HI)  # type: ignore[arg-type]
