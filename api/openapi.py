"""GET /openapi.json: what the endpoints take, made from the very types that read the bodies."""

from collections.abc import Mapping
from typing import Any

import msgspec
import orjson
from aiohttp import web

from api.admin import AbortBody
from api.anthropic_schema import CountBody, MessagesBody
from api.context import CONTEXT
from api.responses_schema import InputBody, ResponsesBody
from api.schema import ChatBody, CompletionBody
from api.token_generate import GenerateBody
from api.tokenize import DetokenizeBody, TokenizeBody

_BODIES: dict[str, tuple[str, type[msgspec.Struct], bool]] = {
    "/v1/chat/completions": ("Answer a chat.", ChatBody, True),
    "/v1/completions": ("Complete a text or token ids.", CompletionBody, True),
    "/v1/messages": ("Answer a chat (Anthropic).", MessagesBody, True),
    "/v1/messages/count_tokens": ("Count a prompt's tokens (Anthropic).", CountBody, False),
    "/v1/responses": ("Answer a chat (Responses).", ResponsesBody, True),
    "/v1/responses/input_tokens": ("Count a prompt's tokens (Responses).", InputBody, False),
    "/inference/v1/generate": ("Generate token ids from token ids.", GenerateBody, True),
    "/v1/chat/completions/render": ("The ids a chat is generated from.", ChatBody, False),
    "/v1/completions/render": ("The ids a completion is generated from.", CompletionBody, False),
    "/tokenize": ("Text or a chat to ids.", TokenizeBody, False),
    "/detokenize": ("Ids to text.", DetokenizeBody, False),
}
_ADMIN_BODIES: dict[str, tuple[str, type[msgspec.Struct], bool]] = {
    "/abort_requests": ("End running requests.", AbortBody, False),
}
_GETS = {
    "/health": "200 while every rank can serve.",
    "/version": "The server's version.",
    "/load": "How many requests are generating.",
    "/v1/models": "The names this server answers to.",
    "/v1/models/{model}": "One of them.",
    "/v1/responses/{response_id}": "A stored response.",
    "/v1/responses/{response_id}/input_items": "What it answered.",
}
_ERRORS = {
    "400": "A field is wrong; `param` names it.",
    "401": "Missing or wrong API key.",
    "404": "Unknown model, response or path.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "500": "The engine failed.",
    "503": "Too busy; see Retry-After.",
}
_STRING_OR_NULL = {"type": ["string", "null"]}
_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _STRING_OR_NULL,
                "code": {"type": ["string", "integer"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_TEXT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
            },
        },
    ]
}
_CHAT_MESSAGE = {
    "description": "One message of a chat. `developer` means system; a tool message answers a call by its id.",
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "latest_reminder"]},
        "content": _TEXT,
        "reasoning_content": _STRING_OR_NULL,
        "reasoning": _STRING_OR_NULL,
        "tool_call_id": _STRING_OR_NULL,
        "tool_calls": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "function"],
                "properties": {
                    "id": {"type": "string"},
                    "type": {"enum": ["function"]},
                    "function": {
                        "type": "object",
                        "required": ["name", "arguments"],
                        "properties": {"name": {"type": "string", "minLength": 1}, "arguments": {"type": "string"}},
                    },
                },
            },
        },
        "prefix": {"type": "boolean", "description": "The answer goes on from this last message."},
    },
}
"""Chat messages are read by the encoder itself, which no type describes."""


def describe(version: str, *, admin: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    bodies = _BODIES | (_ADMIN_BODIES if admin else {})
    kinds = list({kind for _, kind, _ in bodies.values()})
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(kinds, schemas, strict=True))
    components["ChatBody"]["properties"]["messages"] |= {
        "items": {"$ref": "#/components/schemas/ChatMessage"},
        "minItems": 1,
    }
    paths: dict[str, Any] = {}
    for path, (summary, kind, streams) in bodies.items():
        body = {"required": True, "content": {"application/json": {"schema": schema_of[kind]}}}
        answer: dict[str, Any] = {"application/json": {"schema": {}}}
        if streams:
            answer["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses(path, answer)}}
    for path, summary in _GETS.items():
        parameters = [
            {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for part in path.split("/")
            if part.startswith("{")
        ]
        answer = {"application/json": {"schema": {}}}
        operation = {"summary": summary, "parameters": parameters, "responses": _responses(path, answer)}
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": version},
        "paths": paths,
        "components": {
            "schemas": components
            | {"ChatMessage": _CHAT_MESSAGE, "Error": _OPENAI_ERROR, "AnthropicError": _ANTHROPIC_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _responses(path: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    name = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    errors = {status: {"description": text, "content": content} for status, text in _ERRORS.items()}
    success: dict[str, Any] = {"description": "The answer."}
    if path != "/health":
        success["content"] = answer
    return {"200": success, **errors}


async def openapi(request: web.Request) -> web.Response:
    """The handler."""
    context = request.app[CONTEXT]
    document = describe(context.info.version, admin=context.settings.enable_admin)
    return web.Response(body=orjson.dumps(document), content_type="application/json")
