"""The official client and hostile clients, through the router."""

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.cluster.harness import Cluster

MODEL = "tiny-v4"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path_factory.mktemp("cluster"), small_checkpoint) as running:
        yield running
        await running.wait_idle()


MODES = {
    "Non-think": {"thinking": False},
    "Think High": {"thinking": True, "reasoning_effort": "high"},
    "Think Max": {"thinking": True, "reasoning_effort": "max"},
}


async def test_the_three_modes_through_the_official_client(cluster: Cluster) -> None:
    """The example of the model's guide: one client, three `chat_template_kwargs`."""
    client = openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="EMPTY", max_retries=0)
    prompt_tokens = {}
    async with client:
        for mode, kwargs in MODES.items():
            arguments: dict[str, Any] = {
                "model": MODEL,
                "messages": [{"role": "user", "content": "What is 17*19? Return only the final integer."}],
                "temperature": 0.0,
                "max_tokens": 24,
                "extra_body": {"chat_template_kwargs": kwargs},
            }
            whole = await client.chat.completions.create(**arguments)
            message = whole.choices[0].message
            reasoning = getattr(message, "reasoning_content", None) or ""
            assert (getattr(message, "reasoning", None) or "") == reasoning
            assert whole.usage is not None
            assert whole.choices[0].finish_reason in ("stop", "length")
            if mode == "Non-think":
                assert not reasoning
                assert message.content
            else:
                assert reasoning
            prompt_tokens[mode] = whole.usage.prompt_tokens

            said = {"content": "", "reasoning_content": ""}
            stream = await client.chat.completions.create(
                **arguments, stream=True, stream_options={"include_usage": True}
            )
            usage = None
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    for field in said:
                        said[field] += getattr(choice.delta, field, None) or ""
            assert said == {"content": message.content or "", "reasoning_content": reasoning}
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens) == (
                whole.usage.prompt_tokens,
                whole.usage.completion_tokens,
            )
    # Both thinking modes open the turn with one token; Think Max adds the effort text.
    assert prompt_tokens["Non-think"] == prompt_tokens["Think High"] < prompt_tokens["Think Max"]


CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


async def test_a_conversation_is_kept_continued_and_forgotten(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="EMPTY", max_retries=0) as client:
        asked: Any = {"model": MODEL, "max_output_tokens": 6, "temperature": 0.0, "reasoning": {"effort": "none"}}
        first = await client.responses.create(input="What is 17*19?", **asked)
        second = await client.responses.create(input="Why?", previous_response_id=first.id, **asked)
        items: list[Any] = [{"role": "user", "content": "What is 17*19?"}]
        items += [item.model_dump() for item in first.output]
        items.append({"role": "user", "content": "Why?"})
        same = await client.responses.create(input=items, store=False, **asked)
        assert first.usage is not None
        assert second.usage is not None
        assert same.usage is not None
        assert second.output_text == same.output_text
        assert second.usage.input_tokens == same.usage.input_tokens > first.usage.input_tokens
        assert (await client.responses.retrieve(second.id)).output_text == second.output_text
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(input="?", previous_response_id=first.id, **asked)


@pytest.mark.parametrize("budget", [0, 5])
async def test_a_thinking_budget_bounds_the_reasoning_on_both_legs(cluster: Cluster, budget: int) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="EMPTY", max_retries=0) as client:
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
        answer = await client.chat.completions.create(
            **asked, temperature=0.0, extra_body={"ignore_eos": True, "thinking_token_budget": budget}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens == budget
        assert answer.usage.completion_tokens == 12
        assert answer.choices[0].message.content


BAD_INPUT: dict[str, tuple[str, bytes | dict[str, Any], str | None]] = {
    "malformed JSON": ("chat/completions", b'{"model": "tiny-v4", "messages": [', None),
    "not an object": ("chat/completions", b"[]", None),
    "not UTF-8": ("chat/completions", b'{"model": "\xff\xfe"}', None),
    "messages of the wrong type": ("chat/completions", CHAT | {"messages": "hi"}, "messages"),
    "no messages": ("chat/completions", CHAT | {"messages": []}, "messages"),
    "messages missing": ("chat/completions", {"model": MODEL}, "messages"),
    "unknown role": ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "x"}]}, "messages"),
    "content of the wrong type": (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": 7}]},
        "messages",
    ),
    "unknown model": ("chat/completions", CHAT | {"model": "gpt-9"}, "model"),
    "negative max_tokens": ("chat/completions", CHAT | {"max_tokens": -1}, "max_tokens"),
    "max_tokens of the wrong type": ("chat/completions", CHAT | {"max_tokens": "many"}, "max_tokens"),
    "negative temperature": ("chat/completions", CHAT | {"temperature": -0.5}, "temperature"),
    "NaN": ("chat/completions", json.dumps(CHAT | {"temperature": math.nan}).encode(), "temperature"),
    "infinity": ("chat/completions", json.dumps(CHAT | {"top_p": math.inf}).encode(), "top_p"),
    "top_p of zero": ("chat/completions", CHAT | {"top_p": 0}, "top_p"),
    "a boolean for a number": ("chat/completions", CHAT | {"max_tokens": True}, "max_tokens"),
    "prompt too long": ("completions", {"model": MODEL, "prompt": [5] * 20_000, "max_tokens": 1}, None),
    "empty prompt": ("completions", {"model": MODEL, "prompt": [], "max_tokens": 1}, "prompt"),
    "token id out of the vocabulary": ("completions", {"model": MODEL, "prompt": [10**6], "max_tokens": 1}, "prompt"),
    "negative token id": ("completions", {"model": MODEL, "prompt": [-1], "max_tokens": 1}, "prompt"),
    "logit_bias key": ("completions", {"model": MODEL, "prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    "bad grammar": ("chat/completions", CHAT | {"structured_outputs": {"regex": "("}}, "structured_outputs"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
async def test_bad_input_is_refused_in_the_openai_shape_and_nothing_else_suffers(cluster: Cluster, case: str) -> None:
    path, body, field = BAD_INPUT[case]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        headers = {"content-type": "application/json"}
        async with session.post(f"{cluster.url}/v1/{path}", data=data, headers=headers) as response:
            answer = await response.json()
            assert 400 <= response.status < 500, answer
        assert set(answer["error"]) >= {"message", "type", "param", "code"}
        assert answer["error"]["message"]
        assert len(json.dumps(answer)) < 2000, "the error must not echo the input"
        if field is not None:
            assert (answer["error"]["param"] or "").startswith(field), answer
        async with session.post(f"{cluster.url}/v1/chat/completions", json=CHAT) as response:
            assert response.status == 200, await response.text()


async def test_a_body_of_ten_megabytes_gets_an_answer_and_the_server_stays_well(cluster: Cluster) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "x" * 10_000_000}]}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        async with session.post(f"{cluster.url}/v1/chat/completions", json=body) as response:
            answer = await response.json()
            assert 400 <= response.status < 500, answer
            assert "error" in answer
        async with session.post(f"{cluster.url}/v1/chat/completions", json=CHAT) as response:
            assert response.status == 200
