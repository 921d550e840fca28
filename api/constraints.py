"""Structured output and forced tool calls: which grammar a request's output must follow, and what the prompt says."""

from collections.abc import Callable
from typing import Any

from api.chat import RenderedPrompt
from api.context import Context
from api.encoding.blocks import JSON_OBJECT_TEXT, schema_format_text
from api.encoding.markers import THINK_CLOSE
from api.grammar_formats import (
    Format,
    choice_format,
    grammar_format,
    json_object_format,
    json_schema_format,
    regex_format,
)
from api.grammar_tags import structural_tag_format
from api.schema import ChatBody, ResponseFormat, SamplingBody
from runtime.errors import RequestError

UNLIMITED = -1
"""A `thinking_token_budget` without a bound."""

_STRUCTURED: dict[str, Callable[[Any, str], Format]] = {
    "json": json_schema_format,
    "regex": regex_format,
    "choice": choice_format,
    "grammar": grammar_format,
    "json_object": lambda _, __: json_object_format(),
    "structural_tag": structural_tag_format,
}
_GUIDED: dict[str, Callable[[Any, str], Format]] = {
    f"guided_{kind}": _STRUCTURED[kind] for kind in list(_STRUCTURED)[:4]
}
"""The names these had in earlier vLLM versions."""


def check_formats(body: SamplingBody) -> None:
    """Refuse a format that is incomplete, unknown, or more than one. Raises RequestError."""
    answer_format(body)


def answer_format(body: SamplingBody) -> tuple[Format | None, str]:
    """The form a request asks for, and the field that asks. Raises RequestError."""
    asked = [
        *_from_response_format(body.response_format),
        *_from_structured_outputs(body),
        *(
            (build(getattr(body, name), name), name)
            for name, build in _GUIDED.items()
            if getattr(body, name) is not None
        ),
    ]
    if len(asked) > 1:
        fields = " and ".join(param.partition(".")[0] for _, param in asked)
        raise RequestError(f"{fields}: only one of these can shape the answer", param=asked[1][1])
    return asked[0] if asked else (None, "response_format")


def _from_response_format(asked: ResponseFormat | None) -> list[tuple[Format, str]]:
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [(json_object_format(), "response_format")]
    if asked.type == "json_schema":
        param = "response_format.json_schema"
        if asked.json_schema is None:
            raise RequestError(f"{param}: this field is required", param=param)
        return [(json_schema_format(asked.json_schema.schema or {}, f"{param}.schema"), param)]
    if asked.type == "regex" and asked.regex is not None:
        return [(regex_format(asked.regex, "response_format.regex"), "response_format.regex")]
    if asked.type == "structural_tag":
        fields = {"format": asked.format, "structures": asked.structures, "triggers": asked.triggers}
        tag = {name: value for name, value in fields.items() if value is not None}
        return [(structural_tag_format(tag, "response_format"), "response_format")]
    raise RequestError(f"response_format.{asked.type}: this field is required", param=f"response_format.{asked.type}")


def _from_structured_outputs(body: SamplingBody) -> list[tuple[Format, str]]:
    outputs = body.structured_outputs
    if outputs is None:
        return []
    given = [kind for kind in _STRUCTURED if getattr(outputs, kind) is not None]
    if len(given) != 1:
        raise RequestError(
            f"structured_outputs: exactly one of {', '.join(_STRUCTURED)} is needed, got {len(given)}",
            param="structured_outputs",
        )
    [kind] = given
    param = f"structured_outputs.{kind}"
    return [(_STRUCTURED[kind](getattr(outputs, kind), param), param)]


def format_text_of(response_format: ResponseFormat | None) -> str:
    """The block that tells the model about the format; a grammar holds it to that."""
    if response_format is None:
        return ""
    if response_format.type == "json_object":
        return JSON_OBJECT_TEXT
    if response_format.type == "json_schema" and response_format.json_schema is not None:
        return schema_format_text(response_format.json_schema.schema or {})
    return ""


async def chat_constraint(context: Context, body: ChatBody, rendered: RenderedPrompt) -> bytes | None:
    """The grammar of a chat's answer, after its reasoning; None when anything goes."""
    answer, param = answer_format(body)
    return await context.grammars.for_chat(
        rendered,
        answer,
        param,
        single_call=body.parallel_tool_calls is False,
        thinking_budget=_thinking_budget(context, body),
    )


def _thinking_budget(context: Context, body: ChatBody) -> int | None:
    """How many tokens the reasoning may have, None without a bound. Raises RequestError if nothing could end it."""
    if body.thinking_token_budget in (None, UNLIMITED):
        return None
    end_id = context.tokenizer.id_of(THINK_CLOSE)
    if body.allowed_token_ids is not None and end_id not in body.allowed_token_ids:
        param = "thinking_token_budget"
        raise RequestError(f"{param}: needs token {end_id}, which ends the reasoning, to be allowed", param=param)
    return body.thinking_token_budget


async def completion_constraint(context: Context, body: SamplingBody) -> bytes | None:
    """The grammar of a completion; None when anything goes."""
    if body.thinking_token_budget not in (None, UNLIMITED):
        param = "thinking_token_budget"
        raise RequestError(f"{param}: only a chat has reasoning to bound", param=param)
    answer, param = answer_format(body)
    return None if answer is None else await context.grammars.for_text(answer, param)
