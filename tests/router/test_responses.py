"""Responses through the router: conversations whose turns land on different nodes, and what is asked by id."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from tests.api.http.test_chat import WEATHER, calls
from tests.router.surface_nodes import SurfaceCluster, surface_cluster

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    }
]


@pytest.fixture
async def cluster() -> AsyncIterator[SurfaceCluster]:
    async with surface_cluster() as started:
        yield started


@pytest.fixture
async def client(cluster: SurfaceCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


async def test_a_conversation_of_three_turns_goes_on_wherever_its_turns_are_computed(
    cluster: SurfaceCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.script("T</think>Let me see." + calls(WEATHER))
    first = await client.responses.create(model="tiny", input="hi", tools=TOOLS)
    call = first.output[-1]
    assert call.type == "function_call"
    cluster.script("D</think>It is sunny.")
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second = await client.responses.create(model="tiny", input=result, tools=TOOLS, previous_response_id=first.id)
    assert second.output_text == "It is sunny."
    history = "hi<｜Assistant｜><think>T</think>Let me see." + calls(WEATHER)
    assert history in cluster.prompt()
    assert "<tool_result>sunny</tool_result>" in cluster.prompt()
    cluster.script("E</think>Bye.")
    async with client.responses.stream(
        model="tiny", input="bye", tools=TOOLS, previous_response_id=second.id
    ) as stream:
        third = await stream.get_final_response()
    assert third.output_text == "Bye."
    assert third.previous_response_id == second.id
    assert history in cluster.prompt()
    assert "<think>D</think>It is sunny.<｜end▁of▁sentence｜><｜User｜>bye<｜Assistant｜><think>" in cluster.prompt()
    assert all(node.engine.submitted for node in cluster.decodes), "round robin has used both decode nodes"
    asked = [item async for item in await client.responses.input_items.list(third.id, order="asc", limit=3)]
    kinds = ["message", "reasoning", "message", "function_call", "function_call_output", "reasoning", "message"]
    assert [item.type for item in asked] == [*kinds, "message"]


async def test_a_stored_response_is_read_counted_and_deleted_where_it_is_kept(
    cluster: SurfaceCluster, client: openai.AsyncOpenAI
) -> None:
    made = []
    for number in range(4):
        cluster.script(f"</think>A{number}")
        made.append(await client.responses.create(model="tiny", input=f"Q{number}"))
    assert len({response.id[:13] for response in made}) == 2, "two decode nodes keep two each"
    for number, response in enumerate(made):
        assert (await client.responses.retrieve(response.id)).output_text == f"A{number}"
        assert (await client.responses.cancel(response.id)).id == response.id
        counted = await client.responses.input_tokens.count(model="tiny", input="x", previous_response_id=response.id)
        cluster.script("</think>y")
        follow_up = await client.responses.create(model="tiny", input="x", previous_response_id=response.id)
        assert follow_up.usage is not None
        assert counted.input_tokens == follow_up.usage.input_tokens
        await client.responses.delete(response.id)
        for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(response.id)


async def test_references_are_found_on_whichever_node_keeps_their_items(
    cluster: SurfaceCluster, client: openai.AsyncOpenAI
) -> None:
    items: list[Any] = []
    for number in range(3):
        items.append({"role": "user", "content": f"Q{number}"})
        cluster.script(f"T</think>A{number}")
        response = await client.responses.create(model="tiny", input=items)
        items += [{"type": "item_reference", "id": item.id} for item in response.output]
    assert "Q0<｜Assistant｜></think>A0<｜end▁of▁sentence｜><｜User｜>Q1<｜Assistant｜></think>A1" in cluster.prompt()
    assert all(node.engine.submitted for node in cluster.decodes)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="tiny", input=[{"type": "item_reference", "id": "msg_x"}])


async def test_what_was_not_stored_is_not_found(cluster: SurfaceCluster, client: openai.AsyncOpenAI) -> None:
    cluster.script("</think>A")
    response = await client.responses.create(model="tiny", input="Q", store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model="tiny", input="x", previous_response_id=response.id)
    assert caught.value.param == "previous_response_id"


@pytest.mark.parametrize("response_id", ["resp_none", "", "resp_" + "0" * 40, "x/../../metrics", "a\r\nb: c", 5, {}])
async def test_an_id_that_no_node_keeps_is_an_error_in_openais_shape(cluster: SurfaceCluster, response_id: Any) -> None:
    body = {"model": "tiny", "input": "x", "previous_response_id": response_id}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{cluster.url}/v1/responses", json=body) as response,
    ):
        answer = await response.json()
        assert response.status == (404 if isinstance(response_id, str) else 400)
    assert answer["error"]["param"] == "previous_response_id"
    assert not any(node.engine.submitted for node in cluster.decodes)


async def test_responses_go_with_their_node_and_the_error_says_so(
    cluster: SurfaceCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.script("</think>A")
    response = await client.responses.create(model="tiny", input="Q")
    keeper = next(node for node in cluster.decodes if node.engine.submitted)
    await keeper.stop()
    await cluster.until_known(2)
    with pytest.raises(openai.NotFoundError, match="gone"):
        await client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError, match="gone") as caught:
        await client.responses.create(model="tiny", input="x", previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"
    cluster.script("</think>B")
    assert (await client.responses.create(model="tiny", input="Q")).output_text == "B"


async def test_a_running_response_is_cancelled_by_its_id(cluster: SurfaceCluster) -> None:
    for node in cluster.decodes:
        node.engine.step_s = 0.02
    async with aiohttp.ClientSession() as session:
        body = {"model": "tiny", "input": "hi", "stream": True}
        async with session.post(f"{cluster.url}/v1/responses", json=body) as stream:
            first = json.loads((await stream.content.readuntil(b"\n\n")).split(b"data: ")[1])
            url = f"{cluster.url}/v1/responses/{first['response']['id']}/cancel"
            async with session.post(url, json={}) as answer:
                assert (await answer.json())["status"] == "cancelled"
            assert b"response.failed" in await stream.read()
    assert not any(node.engine.num_running for node in cluster.decodes)


async def test_a_client_cannot_put_words_into_the_conversation(cluster: SurfaceCluster) -> None:
    cluster.script("</think>A")
    body = {"model": "tiny", "input": "hi", "previous_items": [{"role": "user", "content": "SECRET"}]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{cluster.url}/v1/responses", json=body) as response,
    ):
        assert response.status == 200
    assert "SECRET" not in cluster.prompt()
