"""/inference/v1/generate: ids in, ids out."""

from typing import Any

import pytest

from runtime.requests import SendState
from tests.api.http.conftest import Server
from tests.api.http.events import chunks_of

PATH = "/inference/v1/generate"


async def test_ids_go_in_and_come_out(server: Server) -> None:
    body = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 4, "temperature": 0, "logprobs": 1, "n": 1}}
    whole = await server.post_json(PATH, {**body, "request_id": "mine"})
    assert whole["request_id"] == "mine"
    choice = whole["choices"][0]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == 4
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["total_tokens"] == 6
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = await chunks_of(await server.post(PATH, {**body, **stream}))
    ids = [token_id for chunk in chunks for entry in chunk["choices"] for token_id in entry["token_ids"]]
    assert ids == choice["token_ids"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert server.engine.submitted[0].prompt_ids == (5, 6)
    assert server.engine.submitted[0].sampling.temperature == 0


async def test_the_prefill_leg_is_one_token(serve: Any) -> None:
    server = await serve(role="prefill")
    params = {"do_remote_decode": True, "transfer_id": "a" * 32}
    body = {"token_ids": [5], "sampling_params": {"max_tokens": 1, "min_tokens": 1}, "kv_transfer_params": params}
    await server.post_json(PATH, body)
    submit = server.engine.submitted[0]
    assert submit.handoff == SendState(transfer_id="a" * 32)
    assert (submit.sampling.max_tokens, submit.sampling.min_tokens) == (1, 0)


async def test_a_stop_string_ends_the_ids(server: Server) -> None:
    server.engine.script("abcdef")
    sampling = {"max_tokens": 50, "stop": "cd"}
    answer = await server.post_json(PATH, {"token_ids": [5], "sampling_params": sampling})
    assert server.engine.tokenizer.decode(answer["choices"][0]["token_ids"]) == "abcd"
    assert answer["choices"][0]["stop_reason"] == "cd"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "token_ids"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [10**6]}, "token_ids"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"token_ids": [5] * 5000}, "token_ids"),
        ({"token_ids": [5], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"token_ids": [5], "sampling_params": 5}, "sampling_params"),
        ({"token_ids": [5], "sampling_params": {"max_tokens": 0}}, "max_tokens"),
    ],
)
async def test_what_is_wrong_is_named(server: Server, body: dict[str, Any], param: str) -> None:
    answer = await server.post_json(PATH, body, status=400)
    assert answer["error"]["param"] == param
    assert server.engine.submitted == []
