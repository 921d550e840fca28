"""Answers and calls bound by a grammar, from the official client through router, prefill and decode."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from tests.cluster.harness import Cluster

CHOICE = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "paint", "parameters": CHOICE}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path_factory.mktemp("structured"), small_checkpoint) as running:
        yield running
        await running.wait_idle()


async def ask(cluster: Cluster, **changes: Any) -> Any:
    """One answer of a model with random weights, which no instruction could bring to follow a format."""
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="EMPTY", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="tiny-v4",
            messages=[{"role": "user", "content": "Paint it, in JSON."}],
            max_tokens=1000,
            seed=7,
            **({"reasoning_effort": "none"} | changes),
        )
    return answer.choices[0]


async def test_an_answer_follows_its_schema(cluster: Cluster) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "choice", "schema": CHOICE}}
    choice = await ask(cluster, response_format=form)
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), CHOICE)


async def test_an_answer_is_one_of_the_choices(cluster: Cluster) -> None:
    choice = await ask(cluster, extra_body={"structured_outputs": {"choice": ["red", "green"]}})
    assert choice.message.content in ("red", "green")


async def test_a_required_call_is_made_and_follows_its_schema(cluster: Cluster) -> None:
    choice = await ask(cluster, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name == "paint"
    jsonschema.validate(json.loads(call.function.arguments), CHOICE)


async def test_a_schema_that_cannot_be_enforced_is_refused(cluster: Cluster) -> None:
    schema = {"type": "array", "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "set", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        await ask(cluster, response_format=form)
