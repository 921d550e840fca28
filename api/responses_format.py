"""The response of /v1/responses, whole and as named, numbered events."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from api.errors import Problem
from api.logprobs import TokenNames, chat_logprobs
from api.parse_events import ContentDelta, ToolArgumentsDelta, ToolCallStart
from api.plain_text import PlainText
from api.reader import Reader
from api.responses_items import ResponsesItems
from api.responses_schema import LOGPROBS, SEALED_REASONING, ResponsesBody
from api.responses_tools import ToolTable
from api.text_output import Piece
from runtime.requests import Tokens

FIRST_EVENTS = 2
"""`response.created` and `response.in_progress` come before all others."""


class ResponsesShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller asked for, most of which the response repeats."""

    response_id: str
    created: int
    model: str
    body: ResponsesBody
    tools: ToolTable
    store: bool
    names: TokenNames

    def response(self) -> dict[str, Any]:
        """The response as it begins."""
        body = self.body
        reasoning, text = body.reasoning, body.text
        choice = body.tool_choice if body.tool_choice is not None else "auto"
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "background": False,
            "completed_at": None,
            "content_filters": None,
            "error": None,
            "frequency_penalty": 0.0,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": self.model,
            "moderation": None,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "presence_penalty": 0.0,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "prompt_cache_retention": None,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self.store,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {
                "format": _without_nulls(text.format) if text and text.format else {"type": "text"},
                "verbosity": text.verbosity if text else None,
            },
            "tool_choice": choice if isinstance(choice, str) else _without_nulls(choice),
            "tools": self.tools.given,
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _without_nulls(value: Any) -> Any:
    """A struct as its caller wrote it."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


class ResponsesResponse:
    """Turns the one choice of a request into a response. `keep` is called with it once it is complete."""

    plain: Sequence[PlainText] = ()

    def __init__(self, reader: Reader, shape: ResponsesShape, keep: Callable[[dict[str, Any]], None]) -> None:
        self._reader = reader
        self._shape = shape
        self._keep = keep
        seals = SEALED_REASONING in (shape.body.include or ())
        self._items = ResponsesItems(shape.response_id, shape.tools, seals=seals)
        self._number = FIRST_EVENTS
        self._finish_reason: str | None = None

    def _read(self, arrived: Sequence[tuple[int, Tokens]]) -> Iterator[dict[str, Any]]:
        single = self._shape.body.parallel_tool_calls is False
        for _, _, piece in self._reader.read(arrived):
            logprobs = self._logprobs(piece)
            for event in piece.events:
                if not (single and isinstance(event, ToolCallStart | ToolArgumentsDelta) and event.index):
                    yield from self._items.add(event, logprobs if isinstance(event, ContentDelta) else [])
            if piece.finish_reason is not None:
                yield from self._finish(piece)

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        """Of the text in this piece, where the caller asked for them."""
        if LOGPROBS not in (self._shape.body.include or ()):
            return []
        return chat_logprobs(piece.logprobs, self._shape.names, self._shape.body.top_logprobs or 0)

    def _finish(self, piece: Piece) -> Iterator[dict[str, Any]]:
        self._finish_reason = piece.finish_reason
        yield from self._items.close(status="incomplete" if piece.finish_reason == "length" else "completed")

    def _complete(self) -> dict[str, Any]:
        """The response as it ended."""
        cut = self._finish_reason == "length"
        usage = self._reader.usage
        response = self._shape.response() | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": self._reader.unix_time(),
            "output": self._items.items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        self._keep(response)
        return response

    # As events

    def start(self) -> bytes:
        response = self._shape.response()
        return b"".join(
            _frame({"type": kind, "response": response, "sequence_number": number})
            for number, kind in enumerate(("response.created", "response.in_progress"))
        )

    def _numbered(self, event: dict[str, Any]) -> bytes:
        event["sequence_number"] = self._number
        self._number += 1
        return _frame(event)

    def feed(self, arrived: Sequence[tuple[int, Tokens]]) -> bytes:
        return b"".join(map(self._numbered, self._read(arrived)))

    def end(self) -> bytes:
        response = self._complete()
        return self._numbered({"type": f"response.{response['status']}", "response": response})

    def error(self, problem: Problem) -> bytes:
        error = {"code": problem.code or "server_error", "message": problem.message}
        response = self._shape.response() | {"status": "failed", "error": error, "output": self._items.items}
        return self._numbered({"type": "response.failed", "response": response})

    # Whole

    async def collect(self) -> dict[str, Any]:
        """Read to the end and answer the JSON body."""
        generation = self._reader.generation
        while generation.running:
            for _ in self._read(await generation.wait()):
                pass
        return self._complete()


def _frame(event: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))
