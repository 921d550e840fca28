"""OpenAI's Responses API: its vectors, its memory, its errors, and the official client."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from api.response_ids import is_kept_by, new_response_id
from api.response_store import ResponseStore
from api.settings import ApiSettings
from runtime.requests import RequestFailed
from tests.api.http.conftest import Server
from tests.api.http.events import parse_events
from tests.api.http.test_chat import WEATHER, calls

PATH = "/v1/responses"
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "api-responses.json").read_text())["vectors"]
REQUESTS = [vector for vector in VECTORS if "/request/" in vector["name"]]
OUTPUTS = [vector for vector in VECTORS if "/output/" in vector["name"]]
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    }
]


def prompt_of(server: Server, index: int = -1) -> str:
    return server.engine.tokenizer.decode(server.engine.submitted[index].prompt_ids, skip_special=False)


@pytest.mark.parametrize("vector", REQUESTS, ids=[vector["name"] for vector in REQUESTS])
async def test_request_vectors(serve: Any, vector: dict[str, Any]) -> None:
    server = await serve(ApiSettings(reasoning_effort_profile="0731"))
    response = await server.post(PATH, vector["input"])
    answer = await response.json()
    if "error" in vector["expected"]:
        assert response.status == 400
        assert answer["error"]["param"] == "reasoning"
        return
    assert response.status == 200, answer
    assert prompt_of(server) == vector["expected"]["prompt"]
    if vector["expected"]["max_tokens"] is not None:
        assert server.engine.submitted[0].sampling.max_tokens == vector["expected"]["max_tokens"]


def anonymous(value: Any, response_id: str) -> Any:
    """Ids, times and counts replaced by what the vectors have in their place."""
    if isinstance(value, list):
        return [anonymous(item, response_id) for item in value]
    if not isinstance(value, dict):
        return value.replace(response_id, "ID").replace("resp_", "") if isinstance(value, str) else value
    result = {key: anonymous(item, response_id) for key, item in value.items() if key != "sequence_number"}
    for key, stand_in in (("created_at", 0), ("completed_at", 0), ("call_id", "call"), ("usage", "usage")):
        if result.get(key) is not None:
            result[key] = stand_in
    for key in ("tools", "tool_choice", "model"):
        if key in result:
            result[key] = "caller's"
    if "effort" in result:
        result["effort"] = None
    return result


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring deltas of one kind joined."""
    result: list[dict[str, Any]] = []
    for event in events:
        if result and event["type"].endswith(".delta") and result[-1]["type"] == event["type"]:
            result[-1] = {**result[-1], "delta": result[-1]["delta"] + event["delta"]}
        else:
            result.append(event)
    return result


@pytest.mark.parametrize("tokens_per_step", [1, 4, 1000])
@pytest.mark.parametrize("vector", OUTPUTS, ids=[vector["name"] for vector in OUTPUTS])
async def test_output_vectors(serve: Any, vector: dict[str, Any], tokens_per_step: int) -> None:
    server = await serve(tokens_per_step=tokens_per_step)
    server.engine.cached_tokens = 2
    text = "".join(vector["input"]["chunks"])
    effort = {"reasoning": {"effort": "high" if vector["input"]["thinking"] else "none"}}
    body = {"input": "hi", "store": False, "tools": [{"type": "function", "name": "f"}], **effort}
    server.engine.script(text)
    frames = parse_events(await (await server.post(PATH, {**body, "stream": True})).read())
    events = [json.loads(data) for _, data in frames]
    assert [name for name, _ in frames] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    response_id = events[0]["response"]["id"].removeprefix("resp_")
    expected = [event["data"] for event in vector["expected"]["events"]]
    assert joined(anonymous(events, response_id)) == joined(anonymous(expected, "ID"))
    server.engine.script(text)
    whole = await server.post_json(PATH, body)
    response_id = whole["id"].removeprefix("resp_")
    assert anonymous(whole, response_id) == anonymous(vector["expected"]["response"], "ID")
    prompt, completion = len(server.engine.submitted[0].prompt_ids), len(server.engine.tokenizer.encode(text)) + 1
    assert whole["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 2},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": vector["input"]["thinking"] * 1},
        "total_tokens": prompt + completion,
    }


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


async def test_the_official_client_streams(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("Thought.</think>Answer.")
    async with client.responses.stream(model="tiny", input="hi") as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(deltas) == final.output_text == "Answer."
    assert [item.type for item in final.output] == ["reasoning", "message"]


async def test_the_official_client_parses_into_its_types(server: Server, client: openai.AsyncOpenAI) -> None:
    class Point(BaseModel):
        x: int

    server.engine.script('T</think>{"x": 1}')
    answer = await client.responses.parse(model="tiny", input="hi", text_format=Point)
    assert answer.output_parsed == Point(x=1)
    assert server.engine.submitted[0].sampling.constraint is not None


async def test_a_tool_conversation_goes_round_by_id(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("T</think>Let me see." + calls(WEATHER))
    first = await client.responses.create(model="tiny", input="hi", tools=TOOLS, instructions="Be kind.")
    call = first.output[-1]
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris", "days": 3})
    server.engine.script("D</think>It is sunny.")
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second = await client.responses.create(model="tiny", input=result, tools=TOOLS, previous_response_id=first.id)
    assert second.output_text == "It is sunny."
    prompt = prompt_of(server)
    assert "hi<｜Assistant｜><think>T</think>Let me see." + calls(WEATHER) in prompt
    assert "<tool_result>sunny</tool_result>" in prompt
    assert "Be kind." not in prompt
    server.engine.script("</think>Bye.")
    third = await client.responses.create(model="tiny", input="bye", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    assert "It is sunny." in prompt_of(server)


async def test_the_same_conversation_goes_round_by_items(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("T</think>" + calls(WEATHER))
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    first = await client.responses.create(model="tiny", input=items, tools=TOOLS, store=False)
    items += [item.model_dump() for item in first.output]
    items.append({"type": "function_call_output", "call_id": items[-1]["call_id"], "output": "sunny"})
    server.engine.script("D</think>ok")
    await client.responses.create(model="tiny", input=items, tools=TOOLS, store=False)
    assert "<think>T</think>" + calls(WEATHER) in prompt_of(server)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)


async def test_stored_responses_can_be_read_and_deleted(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("</think>A")
    first = await client.responses.create(model="tiny", input="hi")
    assert (await client.responses.retrieve(first.id)).output_text == "A"
    assert (await client.responses.cancel(first.id)).id == first.id
    await client.responses.delete(first.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            await call(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model="tiny", input="hi", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"


@pytest.mark.parametrize("stream", [False, True])
async def test_integers_of_any_size_are_kept_and_given_back(server: Server, stream: bool) -> None:
    huge = 2**256 - 1
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"n": {"maximum": huge}}}}
    item = {"role": "user", "content": "hi", "x": huge}
    server.engine.script("</think>A")
    body = await (await server.post(PATH, {"input": [item], "tools": [tool], "stream": stream})).read()
    assert b"server_error" not in body
    response = json.loads(parse_events(body)[-1][1])["response"] if stream else json.loads(body)
    assert response["tools"][0]["parameters"]["properties"]["n"]["maximum"] == huge
    kept = json.loads(await (await server.session.get(f"{server.base_url}{PATH}/{response['id']}/input_items")).read())
    assert kept["data"][0]["x"] == huge
    server.engine.script("</think>B")
    await server.post_json(PATH, {"input": "go on", "tools": [tool], "previous_response_id": response["id"]})
    assert str(huge) in prompt_of(server)


async def test_a_running_response_can_be_cancelled(serve: Any) -> None:
    server = await serve(step_s=0.02)
    response = await server.session.post(server.base_url + PATH, json={"input": "hi", "stream": True})
    first = json.loads((await response.content.readuntil(b"\n\n")).split(b"data: ")[1])
    answer = await server.post_json(f"{PATH}/{first['response']['id']}/cancel", {})
    assert answer["status"] == "cancelled"
    rest = await asyncio.wait_for(response.read(), 5)
    assert b"response.failed" in rest
    assert server.engine.num_running == 0


async def test_what_is_cut_by_length_is_incomplete(server: Server) -> None:
    server.engine.script("</think>abcdef")
    answer = await server.post_json(PATH, {"input": "hi", "max_output_tokens": 4})
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][-1]["status"] == "incomplete"
    assert answer["output"][-1]["content"][0]["text"] == "abc"


async def test_a_failure_in_the_middle_is_an_event(server: Server) -> None:
    server.engine.fail_next = RequestFailed(request_id="", kind="internal", message="x")
    server.engine.fail_after = 2
    frames = parse_events(await (await server.post(PATH, {"input": "hi", "stream": True})).read())
    name, data = frames[-1]
    assert name == "response.failed"
    assert json.loads(data)["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": 5}]}, "input"),
        ({"input": [{"type": "item_reference", "id": 5}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input"),
        ({"input": [{"role": "assistant"}]}, "input"),
        ({"input": [{"type": [], "role": "user", "content": "x"}]}, "input"),
        ({"input": [{"type": "message", "role": {}, "content": "x"}]}, "input"),
        ({"input": [{"type": "reasoning", "content": 5}, {"role": "user", "content": "x"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 5}}}}, "text"),
        ({"text": {"format": {"type": "yaml"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text"),
        ({"tools": [{"type": "fonction", "name": "f"}]}, "tools"),
        ({"tools": [{"type": "custom"}]}, "tools"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "namespace", "name": "m"}]}]}, "tools"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": TOOLS * 2}]}, "tools"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f", "input": {}}]}, "input"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]}},
            "tool_choice",
        ),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
async def test_a_wrong_field_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = await server.post_json(PATH, {"input": "hi", **fields}, status=400)
    assert answer["error"]["param"] == param, answer
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"instructions": "I", "input": [{"role": "user", "content": 5}]}, "input.0.content"),
        ({"input": [{"type": "reasoning"}, {"role": "assistant", "content": "x"}, {"role": "king"}]}, "input.2.role"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input.0.name"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": 5}]}, "input.0.arguments"),
        (
            {
                "instructions": "I",
                "input": [
                    {"role": "user", "content": "x"},
                    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "T"}]},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "d", "output": "r"},
                ],
            },
            "input.3.tool_call_id",
        ),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 5}}}}, "text.format"),
        ({"reasoning": {"effort": "turbo"}}, "reasoning.effort"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ],
)
async def test_errors_name_the_place_as_the_caller_wrote_it(server: Server, fields: dict[str, Any], place: str) -> None:
    answer = await server.post_json(PATH, {"input": "hi", **fields}, status=400)
    assert answer["error"]["message"].startswith(place), answer


@pytest.mark.parametrize("tokens_per_step", [1, 3, 1000])
async def test_log_probabilities_are_those_of_the_text(serve: Any, tokens_per_step: int) -> None:
    server = await serve(tokens_per_step=tokens_per_step)
    text = "a < b\n\n<i> 🦜 the end\n"
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2, "tools": TOOLS}
    for script, expected in (
        ("Thought.</think>\n\n" + text, text),
        ("T</think>" + text.rstrip() + calls(WEATHER), text.rstrip()),
        ("T</think>" + calls(WEATHER), None),
    ):
        server.engine.script(script)
        answer = await server.post_json(PATH, body)
        assert answer["top_logprobs"] == 2
        messages = [item for item in answer["output"] if item["type"] == "message"]
        parts = [part for message in messages for part in message["content"]]
        assert [part["text"] for part in parts] == ([] if expected is None else [expected])
        for part in parts:
            assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == part["text"]
            assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
        server.engine.script(script)
        frames = parse_events(await (await server.post(PATH, {**body, "stream": True})).read())
        events = [json.loads(data) for _, data in frames]
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        streamed = [entry for event in deltas for entry in event["logprobs"]]
        assert streamed == [entry for part in parts for entry in part["logprobs"]]
        done = [event for event in events if event["type"] == "response.output_text.done"]
        assert [event["logprobs"] for event in done] == [part["logprobs"] for part in parts]


async def test_top_logprobs_alone_asks_for_nothing(server: Server) -> None:
    await server.post_json(PATH, {"input": "hi", "top_logprobs": 2, "max_output_tokens": 1})
    assert server.engine.submitted[0].sampling.logprobs is None


async def test_tools_that_only_openai_runs_are_left_out_with_a_warning(server: Server) -> None:
    body = {"input": "hi", "max_output_tokens": 1, "tools": [{"type": "web_search"}, *TOOLS, {"type": "mcp"}]}
    response = await server.post(PATH, body)
    assert response.headers["X-Tandem-Warning"].endswith("mcp, web_search")
    assert [tool["name"] for tool in (await response.json())["tools"]] == ["get_weather"]
    assert "web_search" not in prompt_of(server)
    response = await server.post(PATH, body | {"reasoning": {"effort": "max"}})
    assert "context" in response.headers["X-Tandem-Warning"]
    assert response.headers["X-Tandem-Warning"].endswith("mcp, web_search")
    answer = await server.post_json(PATH, {"input": "hi", "max_output_tokens": 1, "tools": [{"type": "web_search"}]})
    assert answer["tools"] == []
    assert "## Tools" not in prompt_of(server)


async def test_allowed_tools_are_the_only_ones_shown(server: Server) -> None:
    other = {**TOOLS[0], "name": "other"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    body = {"input": "hi", "max_output_tokens": 1, "tools": [*TOOLS, other], "tool_choice": choice}
    answer = await server.post_json(PATH, body)
    assert answer["tool_choice"] == choice
    assert '"name": "other"' in prompt_of(server)
    assert "get_weather" not in prompt_of(server)
    assert server.engine.submitted[0].sampling.constraint is not None


PATCH: Any = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
CRM: Any = {"type": "namespace", "name": "crm", "description": "d", "tools": TOOLS}


def call_of(name: str, key: str, value: str) -> str:
    parameter = f'<｜DSML｜parameter name="{key}" string="true">{value}</｜DSML｜parameter>\n'
    return (
        f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n{parameter}</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )


async def test_items_that_were_kept_can_be_referred_to(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("T</think>Let me see." + calls(WEATHER))
    items: list[Any] = [{"role": "user", "content": "hi"}]
    first = await client.responses.create(model="tiny", input=items, tools=TOOLS)
    items += [{"type": "item_reference", "id": item.id} for item in first.output]
    call: Any = first.output[-1]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    server.engine.script("D</think>ok")
    second = await client.responses.create(model="tiny", input=items, tools=TOOLS)
    assert "hi<｜Assistant｜><think>T</think>Let me see." + calls(WEATHER) in prompt_of(server)
    listed = [item async for item in client.responses.input_items.list(second.id, order="asc")]
    assert [item.type for item in listed] == [
        "message", "reasoning", "message", "function_call", "function_call_output"
    ]  # fmt: skip
    for unknown in ("x", "msg_" + "0" * 40 + "_0", f"{first.output[0].id}9"):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.responses.create(model="tiny", input=[{"type": "item_reference", "id": unknown}])
        assert caught.value.code == "item_not_found"


async def test_a_custom_tool_takes_and_gives_free_text(server: Server, client: openai.AsyncOpenAI) -> None:
    text = '*** Begin "Patch"\n+a\\b 🦜\n*** End'
    script = "T</think>" + call_of("apply_patch", "input", text)
    server.engine.script(script)
    async with client.responses.stream(model="tiny", input="hi", tools=[PATCH]) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    call = final.output[-1]
    assert call.type == "custom_tool_call"
    assert (call.name, call.input) == ("apply_patch", text)
    inputs = [event for event in events if event.type.startswith("response.custom_tool_call_input")]
    assert [event.type.rpartition(".")[2] for event in inputs] == ["delta", "done"]
    assert "The input follows this grammar (lark):\\nstart: /.+/" in prompt_of(server)
    assert final.tools[0].model_dump(exclude_none=True) == PATCH
    server.engine.script("D</think>ok")
    result: Any = [{"type": "custom_tool_call_output", "call_id": call.call_id, "output": "applied"}]
    await client.responses.create(model="tiny", input=result, tools=[PATCH], previous_response_id=final.id)
    assert "<think>T</think>" + call_of("apply_patch", "input", text) in prompt_of(server)
    assert "<tool_result>applied</tool_result>" in prompt_of(server)


async def test_tools_of_a_namespace_are_called_by_both_names(server: Server, client: openai.AsyncOpenAI) -> None:
    script = call_of("crm__get_weather", "city", "Oslo")
    server.engine.script("T</think>" + script)
    choice: Any = {"type": "function", "namespace": "crm", "name": "get_weather"}
    asked: Any = {"model": "tiny", "tools": [CRM, *TOOLS], "tool_choice": choice, "reasoning": {"effort": "high"}}
    first = await client.responses.create(input="hi", **asked)
    call: Any = first.output[-1]
    assert (call.type, call.namespace, call.name) == ("function_call", "crm", "get_weather")
    assert json.loads(call.arguments) == {"city": "Oslo"}
    assert '"name": "crm__get_weather"' in prompt_of(server)
    assert '"name": "get_weather"' not in prompt_of(server)
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    server.engine.script("D</think>ok")
    await client.responses.create(input=result, previous_response_id=first.id, **asked)
    assert "<think>T</think>" + script in prompt_of(server)


async def test_input_items_are_listed_in_pages(server: Server, client: openai.AsyncOpenAI) -> None:
    given: list[Any] = [{"role": "user", "content": f"Q{number}"} for number in range(5)]
    server.engine.script("</think>A")
    response = await client.responses.create(model="tiny", input=given)
    texts = []
    async for item in client.responses.input_items.list(response.id, limit=2):
        assert item.type == "message"
        texts.append(item.content[0].text)  # type: ignore[union-attr]
    assert texts == ["Q4", "Q3", "Q2", "Q1", "Q0"]
    url = f"{PATH}/{response.id}/input_items"
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=no", "after")):
        answer = await server.get(f"{url}?{query}")
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] == param


async def test_a_follow_up_counts_the_tokens_it_will_have(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("T</think>A")
    first = await client.responses.create(model="tiny", input="hi", instructions="Be kind.")
    asked: Any = {"model": "tiny", "input": "and?", "instructions": "Be brief.", "previous_response_id": first.id}
    counted = await client.responses.input_tokens.count(**asked)
    second = await client.responses.create(**asked)
    assert second.usage is not None
    assert counted.input_tokens == second.usage.input_tokens
    assert "Be brief." in prompt_of(server)
    assert "Be kind." not in prompt_of(server)


async def test_reasoning_comes_back_sealed_from_clients_that_keep_no_text(
    server: Server, client: openai.AsyncOpenAI
) -> None:
    server.engine.script("T 🦜</think>" + calls(WEATHER))
    asked: Any = {"model": "tiny", "tools": TOOLS, "store": False, "include": ["reasoning.encrypted_content"]}
    first = await client.responses.create(input="hi", **asked)
    reasoning, call = first.output
    assert reasoning.type == "reasoning"
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": reasoning.encrypted_content}
    items: list[Any] = [{"role": "user", "content": "hi"}, sealed, call.model_dump()]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})  # type: ignore[union-attr]
    server.engine.script("D</think>ok")
    await client.responses.create(input=items, **asked)
    assert "hi<｜Assistant｜><think>T 🦜</think>" + calls(WEATHER) in prompt_of(server)
    for other in (None, 5, "gAAAA", "tandem1.", "tandem1.%%%", "tandem1.AAAA"):
        items[1] = {**sealed, "encrypted_content": other}
        server.engine.script("D</think>ok")
        await client.responses.create(input=items, **asked)
        assert "hi<｜Assistant｜><think></think>" + calls(WEATHER) in prompt_of(server)


async def test_calls_of_tools_that_openai_ran_say_nothing(server: Server) -> None:
    items = [{"role": "user", "content": "hi"}, {"type": "web_search_call", "id": "ws_1", "status": "completed"}]
    await server.post_json(PATH, {"input": items, "max_output_tokens": 1, "reasoning": {"effort": "none"}})
    assert prompt_of(server) == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>"


async def test_a_stored_response_is_not_streamed_again(server: Server) -> None:
    server.engine.script("</think>A")
    answer = await server.post_json(PATH, {"input": "hi"})
    assert (await server.get(f"{PATH}/{answer['id']}?stream=true")).status == 400


async def test_an_id_tells_which_node_keeps_the_response(server: Server) -> None:
    answer = await server.post_json(PATH, {"input": "hi", "max_output_tokens": 1})
    assert is_kept_by(answer["id"], server.engine.info.node_id)
    assert not is_kept_by(answer["id"], "another")
    assert is_kept_by(new_response_id("decode-1"), "decode-1")
    assert new_response_id("a") != new_response_id("a")


def test_the_store_is_bounded_in_number_and_bytes() -> None:
    store = ResponseStore(max_entries=3, max_bytes=2000)
    for number in range(5):
        store.put(str(number), {"text": "x" * 100}, [])
    assert [store.get(str(number)) is not None for number in range(5)] == [False, False, True, True, True]
    store.put("big", {"text": "x" * 5000}, [])
    assert store.get("big") is None
    assert len(store) == 3
    store.put("large", {"text": "x" * 1950}, [])
    assert len(store) == 1
    assert store.num_bytes <= 2000
    store.put("large", {}, [])
    assert store.delete("large")
    assert not store.delete("large")
    assert store.num_bytes == 0
    disabled = ResponseStore(max_entries=0, max_bytes=100)
    disabled.put("a", {}, [])
    assert len(disabled) == 0
