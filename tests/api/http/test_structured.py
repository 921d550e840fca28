"""Structured output and forced calls: what reaches the engine as a grammar, and what is refused."""

import json
from typing import Any

import msgspec
import openai
import pytest
from llguidance import LLMatcher

from api.grammar import Constraint
from api.grammar_tokens import grammar_tokenizer
from tests.api.http.conftest import Server
from tests.api.http.test_chat import TOOLS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def constraint_of(server: Server, index: int = -1) -> Constraint | None:
    raw = server.engine.submitted[index].sampling.constraint
    return None if raw is None else msgspec.msgpack.decode(raw, type=Constraint)


def accepts(server: Server, text: str) -> bool:
    """Whether the last request's grammar takes `text` as a whole answer."""
    constraint = constraint_of(server)
    assert constraint is not None
    matcher = LLMatcher(grammar_tokenizer(server.engine.tokenizer), constraint.grammar)
    assert not matcher.is_error()
    ids = server.engine.tokenizer.encode(text)
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, '{"x": [1]}', "[1]"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        '{"a": 1}',
        '{"b": 1}',
    ),
    ({"response_format": {"type": "regex", "regex": "a+"}}, "aaa", "b"),
    ({"structured_outputs": {"json": SCHEMA}}, '{"a": 1}', '{"a": "x"}'),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a": 1}', '{"a": "x"}'),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, "123", "12a"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes", "maybe"),
    ({"structured_outputs": {"grammar": 'root ::= "x" | "y"'}}, "y", "z"),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"guided_json": SCHEMA}, '{"a": 1}', "{}"),
    ({"guided_regex": "a|b"}, "b", "c"),
    ({"guided_choice": ["u", "v"]}, "v", "w"),
]


@pytest.mark.parametrize(("fields", "good", "bad"), FORMS, ids=[str(fields)[:40] for fields, _, _ in FORMS])
async def test_a_form_becomes_a_grammar(server: Server, fields: dict[str, Any], good: str, bad: str) -> None:
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        await server.post_json(path, {**body, **fields, "max_tokens": 1})
        constraint = constraint_of(server)
        assert constraint is not None
        assert constraint.after_reasoning == (path == CHAT)
        assert accepts(server, good)
        assert not accepts(server, bad)


async def test_the_prompt_tells_of_the_format_and_the_grammar_begins_after_the_reasoning(server: Server) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    await server.post_json(CHAT, {"messages": HI, "response_format": schema, "max_tokens": 1})
    prompt = server.engine.tokenizer.decode(server.engine.submitted[-1].prompt_ids)
    assert "strictly adhere to the following schema" in prompt
    await server.post_json(
        CHAT, {"messages": HI, "response_format": schema, "max_tokens": 1, "reasoning_effort": "none"}
    )
    constraint = constraint_of(server)
    assert constraint is not None
    assert not constraint.after_reasoning


async def test_a_demanded_call_is_bound_and_a_free_one_is_not(server: Server) -> None:
    await server.post_json(CHAT, {"messages": HI, "tools": TOOLS, "max_tokens": 1})
    assert constraint_of(server) is None
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        await server.post_json(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": choice, "max_tokens": 1})
        constraint = constraint_of(server)
        assert constraint is not None
        assert constraint.allows_calls
        assert constraint.after_reasoning


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "nonsense"}}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": 5}}}},
         "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"guided_regex": "["}, "guided_regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": ["x" * 200_000]}}}},
         "response_format"),
    ],
)  # fmt: skip
async def test_what_cannot_be_enforced_is_refused_before_any_work(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        answer = await server.post_json(path, {**body, **fields}, status=400)
        assert answer["error"]["param"] == param, answer
    assert server.engine.submitted == []


async def test_the_official_client_parses_into_its_types(server: Server) -> None:
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        y: int

    server.engine.script('Thought.</think>{"x": 1, "y": 2}')
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as client:
        messages: Any = HI
        answer = await client.chat.completions.parse(model="tiny", messages=messages, response_format=Point)
    assert answer.choices[0].message.parsed == Point(x=1, y=2)
    assert accepts(server, '{"x":1,"y":2}')
