"""What the official clients offer beyond plain calls, against a node alone and against the router."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.api.http.test_chat import WEATHER, calls
from tests.router.surface_nodes import SurfaceCluster, surface_cluster

HI: Any = [{"role": "user", "content": "hi"}]
ONE_POINT = 'T</think>{"x": 1}'


class Point(BaseModel):
    x: int


class get_weather(BaseModel):
    city: str
    days: int


@pytest.fixture
async def cluster() -> AsyncIterator[SurfaceCluster]:
    async with surface_cluster(num_decodes=1) as started:
        yield started


@pytest.fixture(params=["node", "router"])
def url(cluster: SurfaceCluster, request: pytest.FixtureRequest) -> str:
    return cluster.url if request.param == "router" else cluster.decodes[0].url


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="EMPTY", max_retries=0) as client:
        yield client


async def test_chat_parses_into_types(cluster: SurfaceCluster, client: openai.AsyncOpenAI) -> None:
    cluster.script(ONE_POINT)
    answer = await client.chat.completions.parse(model="tiny", messages=HI, response_format=Point)
    assert answer.choices[0].message.parsed == Point(x=1)
    cluster.script("T</think>" + calls(WEATHER))
    tools = [openai.pydantic_function_tool(get_weather)]
    answer = await client.chat.completions.parse(model="tiny", messages=HI, tools=tools, response_format=Point)
    [call] = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == get_weather(city="Paris", days=3)


async def test_chat_streams_into_types(cluster: SurfaceCluster, client: openai.AsyncOpenAI) -> None:
    cluster.script(ONE_POINT)
    async with client.chat.completions.stream(model="tiny", messages=HI, response_format=Point) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert {"content.delta", "content.done", "chunk"} <= kinds
    assert final.choices[0].message.parsed == Point(x=1)
    cluster.script("T</think>Let me see." + calls(WEATHER, WEATHER))
    tools = [openai.pydantic_function_tool(get_weather)]
    async with client.chat.completions.stream(model="tiny", messages=HI, tools=tools) as stream:
        done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [get_weather(city="Paris", days=3)] * 2


async def test_responses_parse_and_stream_into_types(cluster: SurfaceCluster, client: openai.AsyncOpenAI) -> None:
    cluster.script(ONE_POINT)
    answer = await client.responses.parse(model="tiny", input="hi", text_format=Point)
    assert answer.output_parsed == Point(x=1)
    cluster.script(ONE_POINT)
    async with client.responses.stream(model="tiny", input="hi", text_format=Point) as stream:
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(texts) == '{"x": 1}'
    assert final.output_parsed == Point(x=1)
    cluster.script("T</think>" + calls(WEATHER))
    tools: Any = [openai.pydantic_function_tool(get_weather)["function"] | {"type": "function"}]
    answer = await client.responses.parse(model="tiny", input="hi", tools=tools)
    call: Any = answer.output[-1]
    assert (call.type, json.loads(call.arguments)) == ("function_call", {"city": "Paris", "days": 3})


async def test_messages_stream_and_parse(cluster: SurfaceCluster, claude: anthropic.AsyncAnthropic) -> None:
    cluster.script("Thought.</think>Answer." + calls(WEATHER))
    tools: Any = [{"name": "get_weather", "input_schema": get_weather.model_json_schema()}]
    async with claude.messages.stream(model="tiny", max_tokens=500, messages=HI, tools=tools) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json", "message_stop"} <= kinds
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[-1].input == {"city": "Paris", "days": 3}  # type: ignore[union-attr]
    cluster.script(ONE_POINT)
    parsed = await claude.messages.parse(model="tiny", max_tokens=500, messages=HI, output_format=Point)
    assert parsed.parsed_output == Point(x=1)


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_tool_runner_runs_to_the_answer(
    cluster: SurfaceCluster, claude: anthropic.AsyncAnthropic, streamed: bool
) -> None:
    asked: list[tuple[str, int]] = []

    @anthropic.beta_async_tool(name="get_weather")
    async def weather(city: str, days: int) -> str:
        """The weather of some days."""
        asked.append((city, days))
        cluster.script("D</think>It is sunny.")
        return "sunny"

    cluster.script("T</think>" + calls(WEATHER))
    runner: Any = claude.beta.messages.tool_runner(
        model="tiny", max_tokens=500, messages=HI, tools=[weather], stream=streamed
    )
    final = await runner.until_done()
    assert final.content[-1].text == "It is sunny."
    assert asked == [("Paris", 3)]
