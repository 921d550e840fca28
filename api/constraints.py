"""Structured output and forced tool calls: which grammar a request's output must follow, and what the prompt says."""

from api.chat import RenderedPrompt
from api.context import Context
from api.encoding.blocks import JSON_OBJECT_TEXT, schema_format_text
from api.schema import ChatBody, ResponseFormat, SamplingBody
from runtime.errors import RequestError

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def check_formats(body: SamplingBody) -> None:
    """Refuse a format that is incomplete, or more than one. Raises RequestError."""
    outputs = body.structured_outputs
    if outputs is not None:
        given = [kind for kind in _KINDS if getattr(outputs, kind) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs: exactly one of {', '.join(_KINDS)} is needed, got {len(given)}",
                param="structured_outputs",
            )
    response_format = body.response_format
    if response_format is not None and response_format.type == "json_schema" and response_format.json_schema is None:
        raise RequestError("response_format.json_schema: this field is required", param="response_format.json_schema")


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
    return None


async def constraint_of(context: Context, body: SamplingBody) -> bytes | None:
    """The grammar of a completion; None when anything goes."""
    return None
