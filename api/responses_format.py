"""The response of /v1/responses, whole and as named, numbered events."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import orjson

from api.chat_format import new_call_id
from api.errors import Problem
from api.logprobs import TokenNames, chat_logprobs
from api.parse_events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallStart
from api.reader import Reader
from api.responses_request import functions_of
from api.responses_schema import LOGPROBS, SEALED_REASONING, ResponsesBody
from api.sealed_reasoning import seal
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
            "tools": [msgspec.to_builtins(tool) for tool in functions_of(body)],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _without_nulls(struct: msgspec.Struct) -> dict[str, Any]:
    return {key: value for key, value in msgspec.to_builtins(struct).items() if value is not None}


class ResponsesItems:
    """The output items of one response, of which one is open at a time, and the events that build them."""

    def __init__(self, response_id: str, *, seals: bool = False) -> None:
        """`seals`: reasoning items come with their text sealed, too."""
        self._id = response_id.partition("_")[2] or response_id
        self._seals = seals
        self.items: list[dict[str, Any]] = []
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._is_open = False

    def add(self, event: Event, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """`logprobs` are those of the event's text."""
        if isinstance(event, ReasoningDelta):
            yield from self._open("reasoning")
            yield from self._grow("response.reasoning_text.delta", event.text)
        elif isinstance(event, ContentDelta):
            yield from self._open("message")
            self._logprobs += logprobs
            yield from self._grow("response.output_text.delta", event.text, logprobs=logprobs)
        elif isinstance(event, ToolCallStart):
            yield from self.close("commentary")
            yield from self._open("function_call", event.name)
        elif isinstance(event, ToolArgumentsDelta):
            self._text.append(event.text)
            yield self._event("response.function_call_arguments.delta", delta=event.text)

    def _open(self, kind: str, name: str = "") -> Iterator[dict[str, Any]]:
        if self._is_open and self.items[-1]["type"] == kind:
            return
        yield from self.close()
        number = len(self.items)
        item: dict[str, Any]
        if kind == "reasoning":
            item = {"type": kind, "id": f"rs_{self._id}_{number}", "status": "in_progress", "content": [],
                    "summary": [], "encrypted_content": f"{self._id}-{number}"}  # fmt: skip
        elif kind == "message":
            item = {"type": kind, "id": f"msg_{self._id}_{number}", "status": "in_progress", "role": "assistant",
                    "phase": "final_answer", "content": []}  # fmt: skip
        else:
            item = {"type": kind, "id": f"fc_{self._id}_{number}", "status": "in_progress", "call_id": new_call_id(),
                    "name": name, "arguments": ""}  # fmt: skip
        self._is_open = True
        self._text, self._logprobs = [], []
        self.items.append(item)
        yield {"type": "response.output_item.added", "item": dict(item), "output_index": number}
        if kind != "function_call":
            yield self._event("response.content_part.added", content_index=0, part=self._part())

    def _grow(self, kind: str, text: str, **more: Any) -> Iterator[dict[str, Any]]:
        self._text.append(text)
        yield self._event(kind, content_index=0, delta=text, **more)

    def _part(self) -> dict[str, Any]:
        text = "".join(self._text)
        if self.items[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": list(self._logprobs), "text": text}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def close(self, phase: str = "final_answer", status: str = "completed") -> Iterator[dict[str, Any]]:
        """Complete the open item, if one is."""
        if not self._is_open:
            return
        self._is_open = False
        item, text = self.items[-1], "".join(self._text)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event("response.function_call_arguments.done", arguments=text)
        else:
            part = self._part()
            item["content"] = [part]
            if item["type"] == "message":
                item["phase"] = phase
                yield self._event("response.output_text.done", content_index=0, text=text, logprobs=part["logprobs"])
            else:
                if self._seals:
                    item["encrypted_content"] = seal(text)
                yield self._event("response.reasoning_text.done", content_index=0, text=text)
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield {"type": "response.output_item.done", "item": item, "output_index": len(self.items) - 1}


class ResponsesResponse:
    """Turns the one choice of a request into a response. `keep` is called with it once it is complete."""

    def __init__(self, reader: Reader, shape: ResponsesShape, keep: Callable[[dict[str, Any]], None]) -> None:
        self._reader = reader
        self._shape = shape
        self._keep = keep
        seals = SEALED_REASONING in (shape.body.include or ())
        self._items = ResponsesItems(shape.response_id, seals=seals)
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
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
