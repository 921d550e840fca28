"""The official `openai` package against the surface."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from api.settings import ApiSettings
from tests.api.http.conftest import Server
from tests.api.http.test_chat import TOOLS, WEATHER, calls

HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("kwargs", "ends_with"),
    [
        ({"thinking": False}, "</think>"),
        ({"thinking": True, "reasoning_effort": "high"}, "<think>"),
        ({"thinking": True, "reasoning_effort": "max"}, "<think>"),
    ],
)
async def test_the_three_modes_of_the_models_guide(
    server: Server, client: openai.AsyncOpenAI, kwargs: dict[str, Any], ends_with: str
) -> None:
    server.engine.script("Thought.</think>Answer." if kwargs["thinking"] else "Answer.")
    answer = await client.chat.completions.create(
        model="tiny", messages=HI, temperature=1.0, top_p=1.0, extra_body={"chat_template_kwargs": kwargs}
    )
    prompt = server.engine.tokenizer.decode(server.engine.submitted[0].prompt_ids)
    assert prompt.endswith(ends_with)
    assert ("Absolute maximum" in prompt) == (kwargs.get("reasoning_effort") == "max")
    message: Any = answer.choices[0].message
    assert message.content == "Answer."
    assert message.reasoning_content == ("Thought." if kwargs["thinking"] else None)


async def test_chat_streams_with_usage(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("Thought.</think>Answer.")
    stream = await client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    content, reasoning, usage = "", "", None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta: Any = choice.delta
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
    assert (reasoning, content) == ("Thought.", "Answer.")
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == len("Thought.")


async def test_the_clients_own_accumulator_builds_tool_calls(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("T</think>" + calls(WEATHER))
    tools: Any = TOOLS
    async with client.chat.completions.stream(model="tiny", messages=HI, tools=tools) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "get_weather"
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris", "days": 3}


async def test_a_tool_conversation_goes_round(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.script("T</think>" + calls(WEATHER))
    tools: Any = TOOLS
    messages: list[Any] = list(HI)
    first = await client.chat.completions.create(model="tiny", messages=messages, tools=tools)
    message = first.choices[0].message
    assert message.tool_calls is not None
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    server.engine.script("Done</think>It is sunny.")
    second = await client.chat.completions.create(model="tiny", messages=messages, tools=tools)
    assert second.choices[0].message.content == "It is sunny."
    prompt = server.engine.tokenizer.decode(server.engine.submitted[1].prompt_ids)
    assert "<think>T</think>" + calls(WEATHER) in prompt
    assert "<tool_result>sunny</tool_result>" in prompt


async def test_completions_whole_and_streamed(server: Server, client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(
        model="tiny", prompt="Hello", max_tokens=4, temperature=0, logprobs=1, echo=True
    )
    assert whole.choices[0].text.startswith("Hello")
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.text_offset == [0, 5, 6, 7, 8]
    stream = await client.completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0, stream=True)
    text = "".join([choice.text async for chunk in stream for choice in chunk.choices])
    assert "Hello" + text == whole.choices[0].text


async def test_the_client_raises_its_own_errors(serve: Any) -> None:
    server = await serve(ApiSettings(api_keys=("right",)))
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="right", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=HI)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=HI, temperature=9)
        assert caught.value.param == "temperature"
        server.engine.trouble = "gone"
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="tiny", messages=HI)


async def test_an_error_in_a_stream_is_raised_by_the_client(server: Server, client: openai.AsyncOpenAI) -> None:
    from runtime.requests import RequestFailed

    server.engine.fail_next = RequestFailed(request_id="", kind="internal", message="x")
    server.engine.fail_after = 2
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
