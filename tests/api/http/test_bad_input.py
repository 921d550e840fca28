"""Whatever a caller sends: a 4xx in OpenAI's shape that names the field, nothing submitted, and a server still well."""

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from api.settings import ApiSettings
from tests.api.http.conftest import Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "errors.json").read_text())["vectors"]


async def assert_refused(server: Server, path: str, raw: bytes, status: int, param: str | None) -> str:
    """Post bytes; the answer must be an error naming `param`, and the next request must work."""
    headers = {"Content-Type": "application/json"}
    async with server.session.post(server.base_url + path, data=raw, headers=headers) as response:
        answer = await response.json()
        assert response.status == status, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param, answer
    message: str = answer["error"]["message"]
    assert len(message) <= 500
    assert server.engine.submitted == []
    assert (await server.get("/health")).status == 200
    await server.post_json(COMPLETIONS, {"prompt": "a", "max_tokens": 1})
    assert server.engine.num_running == 0
    return message


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
async def test_error_vectors(serve: Any, vector: dict[str, Any]) -> None:
    server = await serve(ApiSettings(served_model_name=("m",)))
    given, expected = vector["input"], vector["expected"]
    response = await server.post(given["endpoint"], given["body"])
    answer = await response.json()
    assert response.status == expected["status"], answer
    if expected["status"] != 200:
        assert answer["error"]["param"] == expected["param"], answer
        assert server.engine.submitted == []


@pytest.mark.parametrize(
    "raw",
    [b"", b"   ", b"{", b'{"messages": [', b"nonsense", b"[]", b'"text"', b"17", b"null", b"\xff\xfe",
     b'{"model": "\xff"}', b'{"messages": [}]',
     b'{"prompt": "a", "messages": []} {}', b'{"x":' + b"[" * 20000 + b"]" * 20000 + b"}"],
    ids=["empty", "blank", "cut", "cut deeper", "word", "array", "string", "number", "null", "bytes", "bad utf-8",
         "bracket", "two objects", "deep"],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_not_a_json_object_is_refused(server: Server, path: str, raw: bytes) -> None:
    await assert_refused(server, path, raw, 400, None)


WRONG_FIELDS: list[tuple[str, Any]] = [
    ("temperature", -1),
    ("temperature", 2.5),
    ("temperature", True),
    ("temperature", [1]),
    ("temperature", "nan"),
    ("top_p", 0),
    ("top_p", -0.5),
    ("top_p", "inf"),
    ("top_k", -2),
    ("top_k", 2**40),
    ("top_k", True),
    ("min_p", -0.1),
    ("presence_penalty", -3),
    ("frequency_penalty", 2.01),
    ("repetition_penalty", -1),
    ("max_tokens", -5),
    ("max_tokens", 1.5),
    ("max_tokens", False),
    ("max_tokens", 10**30),
    ("max_tokens", 10**6),
    ("min_tokens", 2**70),
    ("n", -1),
    ("n", 129),
    ("n", True),
    ("seed", 2**63),
    ("seed", 1.5),
    ("stop", [""]),
    ("stop", ""),
    ("stop", 5),
    ("stop", ["a"] * 65),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", 5),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [10**6]),
    ("logit_bias", {"999999": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"5": "x"}),
    ("logit_bias", {"5": "nan"}),
    ("logit_bias", [1]),
    ("bad_words", [" "]),
    ("bad_words", "the"),
    ("stream", "maybe"),
    ("stream_options", {"include_usage": True}),
    ("stream_options", 5),
    ("prompt_logprobs", -2),
    ("prompt_logprobs", 21),
    ("best_of", 3),
    ("priority", 2**64),
    ("cache_salt", ""),
    ("cache_salt", "a/b"),
    ("request_id", ""),
    ("thinking_token_budget", -2),
    ("structured_outputs", {}),
    ("kv_transfer_params", 5),
    ("kv_transfer_params", {"do_remote_decode": True}),
    ("model", 5),
]


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS, ids=[f"{field}={str(v)[:20]}" for field, v in WRONG_FIELDS])
async def test_a_wrong_field_is_named(server: Server, field: str, value: Any) -> None:
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "hi"})):
        raw = json.dumps({**body, field: value}).encode()
        message = await assert_refused(server, path, raw, 400, field)
        assert field in message
        server.engine.submitted.clear()


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b'"NaN"', b'"-inf"'])
@pytest.mark.parametrize("field", [b"temperature", b"top_p", b"presence_penalty", b"repetition_penalty"])
async def test_numbers_that_are_none_are_refused_by_name(server: Server, field: bytes, number: bytes) -> None:
    raw = b'{"messages": [{"role": "user", "content": "hi"}], "%b": %b}' % (field, number)
    await assert_refused(server, CHAT, raw, 400, field.decode())


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hi", "messages"),
        ([5], "messages.0"),
        ([{"content": "hi"}], "messages.0.role"),
        ([{"role": "robot", "content": "hi"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content.0"),
        ([{"role": "user", "content": [5]}], "messages.0.content.0"),
        ([*HI, {"role": "assistant", "tool_calls": 5}], "messages.1.tool_calls"),
        ([*HI, {"role": "assistant", "tool_calls": [{"function": {}}]}], "messages.1.tool_calls.0.function"),
        ([*HI, {"role": "tool", "content": "r", "tool_call_id": "x"}], "messages.1"),
    ],
)
async def test_a_wrong_message_is_named_by_its_place(server: Server, messages: Any, place: str) -> None:
    message = await assert_refused(server, CHAT, json.dumps({"messages": messages}).encode(), 400, "messages")
    assert place in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            },
            "tool_choice",
        ),
        ({"chat_template_kwargs": {"thinking": "yes"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"reasoning_effort": "turbo"}}, "reasoning_effort"),
        ({"thinking": {"type": "sometimes"}}, "thinking"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
async def test_a_wrong_chat_field_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    await assert_refused(server, CHAT, json.dumps({"messages": HI, **fields}).encode(), 400, param)


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [5, "a"], [[5], "a"], [[5], 5], [-1], [10**6], [[10**6]], 5, {"a": 1}, ["a", ""], None]
)
async def test_a_wrong_prompt_is_refused(server: Server, prompt: Any) -> None:
    await assert_refused(server, COMPLETIONS, json.dumps({"prompt": prompt}).encode(), 400, "prompt")


async def test_an_unknown_model_is_not_found(server: Server) -> None:
    message = await assert_refused(
        server, CHAT, json.dumps({"model": "m" * 10_000, "messages": HI}).encode(), 404, "model"
    )
    assert "tiny" in message


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(serve: Any, path: str) -> None:
    server = await serve(max_model_len=64)
    text = "x" * 100
    body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    answer = await server.post_json(path, body, status=400)
    error = answer["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if path == CHAT else "prompt")
    assert "64" in error["message"]
    length = len(server.engine.tokenizer.encode(text)) + (3 if path == CHAT else 0)
    assert any(str(length + extra) in error["message"] for extra in range(3)), error
    assert server.engine.submitted == []


async def test_a_body_of_ten_megabytes_is_refused_without_being_repeated(server: Server) -> None:
    text = "x" * 10_000_000
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    message = await assert_refused(server, CHAT, body, 400, "messages")
    assert "4096" in message
    server.engine.submitted.clear()
    await assert_refused(server, CHAT, b'{"messages": "' + text.encode() + b'"}', 400, "messages")
    server.engine.submitted.clear()
    await assert_refused(server, CHAT, text.encode(), 400, None)


async def test_a_body_over_the_limit_is_413_and_the_connection_stays_usable(serve: Any) -> None:
    server = await serve(ApiSettings(max_body_bytes=100_000))
    async with ClientSession() as session:
        for _ in range(3):
            async with session.post(server.base_url + CHAT, json={"messages": "x" * 300_000}) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == 413
            async with session.post(server.base_url + CHAT, json={"messages": HI, "max_tokens": 1}) as response:
                assert response.status == 200


async def test_other_media_types_are_415(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = await server.session.post(server.base_url + CHAT, data=b"{}", headers={"Content-Type": kind})
        assert response.status == 415, kind
        assert (await response.json())["error"]["type"] == "UnsupportedMediaTypeError"


async def test_unknown_paths_and_methods_have_the_same_shape(server: Server) -> None:
    for path in ("/", "/v1/nothing", "/v1/embeddings", "/v1/chat/completions/more"):
        answer = await server.post_json(path, {}, status=404)
        assert answer["error"]["type"] == "NotFoundError"
    response = await server.get(CHAT)
    assert response.status == 405
    assert response.headers["Allow"] == "POST"
    assert (await response.json())["error"]["code"] == 405


async def test_fields_that_are_not_ours_are_ignored(server: Server) -> None:
    body = {
        "messages": HI, "max_tokens": 1, "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "safety_identifier": "s", "prompt_cache_key": "k", "modalities": ["text"], "verbosity": "low",
        "no_stop_trim": False, "separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False,
        "frobnicate": {"deep": [1, 2]},
    }  # fmt: skip
    await server.post_json(CHAT, body)
