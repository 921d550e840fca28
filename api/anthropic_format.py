"""The response of /v1/messages, whole and as named events."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from api.chat_format import new_call_id
from api.errors import Problem
from api.parse_events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallStart
from api.plain_text import frames_of
from api.reader import Reader
from api.text_output import Piece
from runtime.requests import Tokens


class MessagesShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller wants to see."""

    response_id: str
    model: str
    parallel_tool_calls: bool = True
    thinks: bool = False
    """The answer begins with a block of thinking, even if nothing was thought."""


class MessagesResponse:
    """Turns the one choice of a request into content blocks, of which one is open at a time."""

    def __init__(self, reader: Reader, shape: MessagesShape) -> None:
        self._reader = reader
        self._shape = shape
        self.plain = reader.plain
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._arguments: list[str] = []
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    def _read(self, arrived: Sequence[tuple[int, Tokens]]) -> Iterator[dict[str, Any]]:
        """The events of what arrived."""
        for _, _, piece in self._reader.read(arrived):
            for event in piece.events:
                yield from self._on_event(event)
            if piece.finish_reason is not None:
                if self._shape.thinks and not self._blocks:
                    yield from self._in_block(_empty_thinking())
                self._set_stop(piece)
                yield from self._close_block()

    def _on_event(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, ReasoningDelta):
            yield from self._in_block(_empty_thinking())
            self._blocks[-1]["thinking"] += event.text
            yield self._delta({"type": "thinking_delta", "thinking": event.text})
        elif isinstance(event, ContentDelta):
            yield from self._in_block({"type": "text", "text": ""})
            self._blocks[-1]["text"] += event.text
            yield self._delta({"type": "text_delta", "text": event.text})
        elif isinstance(event, ToolCallStart | ToolArgumentsDelta):
            if event.index and not self._shape.parallel_tool_calls:
                return
            if isinstance(event, ToolCallStart):
                yield from self._close_block()
                yield from self._in_block({"type": "tool_use", "id": new_call_id(), "name": event.name, "input": {}})
            else:
                self._arguments.append(event.text)
                yield self._delta({"type": "input_json_delta", "partial_json": event.text})

    def _in_block(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Open `block` unless one of its kind is open."""
        if self._is_open and self._blocks[-1]["type"] == block["type"]:
            return
        if self._shape.thinks and not self._blocks and block["type"] != "thinking":
            yield from self._in_block(_empty_thinking())
        yield from self._close_block()
        self._is_open = True
        self._blocks.append(block)
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}
        if len(self._blocks) == 1:
            yield {"type": "ping"}

    def _close_block(self) -> Iterator[dict[str, Any]]:
        if not self._is_open:
            return
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "thinking":
            block["signature"] = self._shape.response_id
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        elif block["type"] == "tool_use":
            block["input"] = _object("".join(self._arguments))
            self._arguments = []
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _set_stop(self, piece: Piece) -> None:
        if isinstance(piece.stop_reason, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", piece.stop_reason
        elif piece.finish_reason == "length":
            self._stop_reason = "max_tokens"
        else:
            self._stop_reason = "tool_use" if any(b["type"] == "tool_use" for b in self._blocks) else "end_turn"

    def _usage(self, output_tokens: int) -> dict[str, Any]:
        usage = self._reader.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": output_tokens,
            "service_tier": "standard",
        }

    def _message(self, content: list[dict[str, Any]], output_tokens: int) -> dict[str, Any]:
        return {
            "id": self._shape.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._shape.model,
            "content": content,
            "stop_reason": self._stop_reason if content or output_tokens else None,
            "stop_sequence": self._stop_sequence if content or output_tokens else None,
            "usage": self._usage(output_tokens),
        }

    # As events

    def start(self) -> bytes:
        return _frame({"type": "message_start", "message": self._message([], 0)})

    def feed(self, arrived: Sequence[tuple[int, Tokens]]) -> bytes:
        return frames_of(arrived, self.plain, self._reader.clock(), self._step)

    def _step(self, number: int, tokens: Tokens) -> bytes:
        frames = b"".join(map(_frame, self._read([(number, tokens)])))
        kind = "thinking" if self._reader.in_reasoning(number) else "text"
        if self._is_open and self._blocks[-1]["type"] == kind:
            empty = _frame(self._delta({"type": f"{kind}_delta", kind: ""}))
            at = empty.rindex(b'""') + 1
            self.plain[number].frame = (empty[:at], empty[at:])
        else:
            # The block must be opened first.
            self.plain[number].close()
        return frames

    def end(self) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        usage = self._usage(self._reader.usage.completion_tokens)
        return _frame({"type": "message_delta", "delta": delta, "usage": usage}) + _frame({"type": "message_stop"})

    def error(self, problem: Problem) -> bytes:
        return _frame(problem.body("anthropic") | {"type": "error"})

    # Whole

    async def collect(self) -> dict[str, Any]:
        """Read to the end and answer the JSON body."""
        generation = self._reader.generation
        while generation.running:
            for _ in self._read(await generation.wait()):
                pass
        return self._message(self._blocks, self._reader.usage.completion_tokens)


def _object(arguments: str) -> dict[str, Any]:
    """A call's input; empty for one that was cut short, which is no JSON."""
    try:
        value = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _empty_thinking() -> dict[str, Any]:
    return {"type": "thinking", "thinking": "", "signature": ""}


def _frame(event: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))
