"""/tokenize, /detokenize, render, and the operators' endpoints."""

import asyncio
from typing import Any

from api.settings import ApiSettings
from tests.api.http.conftest import Server
from tests.api.http.test_chat import TOOLS

HI = [{"role": "user", "content": "hi <｜User｜>"}]


async def test_text_goes_to_ids_and_back(server: Server) -> None:
    text = "<｜begin▁of▁sentence｜>Hello é🙂"
    answer = await server.post_json("/tokenize", {"prompt": text, "return_token_strs": True})
    assert answer["tokens"] == server.engine.tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 4096
    assert answer["token_strs"][:2] == ["<｜begin▁of▁sentence｜>", "Hello"]
    back = await server.post_json("/detokenize", {"tokens": answer["tokens"]})
    assert back == {"prompt": text}
    assert (await server.post_json("/tokenize", {"prompt": ""}))["count"] == 0


async def test_a_chat_has_the_ids_it_is_generated_from(server: Server) -> None:
    for fields in ({}, {"tools": TOOLS}, {"reasoning_effort": "max"}, {"chat_template_kwargs": {"thinking": False}}):
        body: dict[str, Any] = {"messages": HI, **fields}
        counted = await server.post_json("/tokenize", body)
        rendered = await server.post_json("/v1/chat/completions/render", body)
        await server.post_json("/v1/chat/completions", {**body, "max_tokens": 1})
        ids = list(server.engine.submitted[-1].prompt_ids)
        assert counted["tokens"] == rendered["token_ids"] == ids


async def test_completions_render_one_list_per_prompt(server: Server) -> None:
    rendered = await server.post_json("/v1/completions/render", {"prompt": ["Hello", "a"]})
    encode = server.engine.tokenizer.encode
    assert [item["token_ids"] for item in rendered] == [encode("Hello"), encode("a")]
    assert server.engine.submitted == []


async def test_bad_bodies_are_refused(server: Server) -> None:
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**7]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/v1/completions/render", {}, "prompt"),
        ("/v1/chat/completions/render", {"messages": HI, "tools": []}, "tools"),
    ):
        response = await server.post(path, body)
        assert response.status == (404 if param == "model" else 400), (path, body)
        assert (await response.json())["error"]["param"] == param


async def test_operators_endpoints_are_closed_unless_switched_on(server: Server) -> None:
    for path in ("/abort_requests", "/reset_prefix_cache"):
        assert (await server.post(path, {})).status == 404
    assert (await server.get("/server_info")).status == 404


async def test_operators_abort_by_id_or_all(serve: Any) -> None:
    server = await serve(ApiSettings(enable_admin=True, api_keys=("k",)), step_s=0.02)
    auth = {"Authorization": "Bearer k"}
    body = {"messages": HI, "max_tokens": 1000}

    def start(name: str, **fields: Any) -> asyncio.Task[Any]:
        headers = {**auth, "X-Request-Id": name}
        return asyncio.create_task(server.post("/v1/chat/completions", {**body, **fields}, headers=headers))

    first, second, third = start("one"), start("two"), start("three", stream=True)
    async with asyncio.timeout(5):
        while len(server.engine.submitted) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    answer = await server.post_json("/abort_requests", {"request_ids": ["one", "chatcmpl-x"]}, headers=auth)
    assert answer == {"aborted": ["chatcmpl-one"]}
    assert (await first).status == 409
    assert server.engine.num_running == 2
    answer = await server.post_json("/abort_requests", {}, headers=auth)
    assert sorted(answer["aborted"]) == ["chatcmpl-three", "chatcmpl-two"]
    assert (await second).status == 409
    assert b'"code":"aborted"' in await (await third).read()
    assert server.engine.num_running == 0
    assert (await server.post("/reset_prefix_cache", {}, headers=auth)).status == 200
    assert server.engine.cache_resets == 1
    info = await (await server.get("/server_info", headers=auth)).json()
    assert info["engine"]["model_id"] == "tiny"
    assert info["settings"]["api_keys"] == 1
    assert (await server.post("/abort_requests", {})).status == 401
