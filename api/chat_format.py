"""The response of /v1/chat/completions, whole and as events."""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from api.errors import Problem
from api.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from api.parse_events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallEnd, ToolCallStart
from api.plain_text import frames_of
from api.reader import Reader
from api.sse import DONE
from api.text_output import Piece
from runtime.requests import Submit, Tokens


class ChatShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller wants to see."""

    response_id: str
    created: int
    model: str
    names: TokenNames
    reasoning_fields: tuple[str, ...]
    include_reasoning: bool = True
    parallel_tool_calls: bool = True
    named_tool: bool = False
    """A tool was forced by name: its call ends with "stop", as in OpenAI's API."""
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    prompt_text: str | None = None
    """The rendered prompt, where the caller asked for it."""


_NOTHING_MORE = b',"logprobs":null,"finish_reason":null}]}\n\n'


def _around(names: Sequence[str]) -> tuple[bytes, ...]:
    """What a delta has before, between and behind the places of its text, which it has under each of these names."""
    starts = [b'"%b":"' % name.encode() for name in names]
    return (b"{" + starts[0], *(b'",' + start for start in starts[1:]), b'"}')


_CONTENT = _around(["content"])


def _in_json(text: str) -> bytes:
    """A text as it stands between the quotes of a JSON string."""
    return orjson.dumps(text)[1:-1]


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class _Choice:
    """What one choice has shown so far."""

    def __init__(self) -> None:
        self.has_calls = False
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None


class ChatResponse:
    """Turns tokens into messages."""

    def __init__(self, reader: Reader, submits: Sequence[Submit], shape: ChatShape) -> None:
        self._reader = reader
        self._shape = shape
        self._prompt_ids = submits[0].prompt_ids
        self._choices = [_Choice() for _ in submits]
        self._prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
        head = {
            "id": shape.response_id,
            "object": "chat.completion.chunk",
            "created": shape.created,
            "model": shape.model,
        }
        # Most of a chunk is the same every time: what comes before the delta, and what comes after it.
        self._head = b"data: %b," % orjson.dumps(head)[:-1]
        self._openings = [
            b'%b"choices":[{"index":%d,"delta":' % (self._head, number) for number in range(len(self._choices))
        ]
        self._shows_all = shape.include_reasoning and shape.parallel_tool_calls
        self._only_deltas = not (shape.num_logprobs is not None or shape.return_token_ids or shape.continuous_usage)
        self._reasoning = _around(shape.reasoning_fields)
        self.plain = reader.plain if self._only_deltas else ()

    def _take(self, choice: _Choice, tokens: Tokens, piece: Piece) -> tuple[Sequence[Event], Piece]:
        """The events that the caller sees of one step, and the step without hidden tokens."""
        shape = self._shape
        if piece.num_hidden:
            ids, logprobs = piece.token_ids[piece.num_hidden :], piece.logprobs[piece.num_hidden :]
            piece = msgspec.structs.replace(piece, token_ids=ids, logprobs=logprobs)
        if tokens.prompt_logprobs is not None and shape.num_prompt_logprobs is not None:
            self._prompt_logprobs = prompt_logprobs(tokens.prompt_logprobs, shape.names, shape.num_prompt_logprobs)
        shown = piece.events if self._shows_all else [event for event in piece.events if self._shows(event)]
        for event in shown:
            if type(event) is ToolCallStart:
                choice.has_calls = True
        if piece.finish_reason is not None:
            choice.stop_reason = piece.stop_reason
            choice.finish_reason = self._finish_reason(choice, piece)
        return shown, piece

    def _shows(self, event: Event) -> bool:
        if isinstance(event, ReasoningDelta):
            return self._shape.include_reasoning
        if isinstance(event, ToolCallStart | ToolArgumentsDelta):
            return self._shape.parallel_tool_calls or event.index == 0
        return isinstance(event, ContentDelta)

    def _finish_reason(self, choice: _Choice, piece: Piece) -> str:
        assert piece.finish_reason is not None
        ended_by_itself = piece.finish_reason == "stop" and piece.stop_reason is None
        if ended_by_itself and choice.has_calls and not self._shape.named_tool:
            return "tool_calls"
        return piece.finish_reason

    # As events

    def start(self) -> bytes:
        """The role, once per choice."""
        prompt = b""
        if self._shape.return_token_ids:
            prompt += b',"prompt_token_ids":%b' % orjson.dumps(list(self._prompt_ids))
        if self._shape.prompt_text is not None:
            prompt += b',"prompt_text":%b' % orjson.dumps(self._shape.prompt_text)
        return b"".join(
            b'%b"choices":[{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}]%b}\n\n' % (self._head, number, prompt)
            for number in range(len(self._choices))
        )

    def feed(self, arrived: Sequence[tuple[int, Tokens]]) -> bytes:
        return frames_of(arrived, self.plain, self._reader.clock(), self._step)

    def _step(self, number: int, tokens: Tokens) -> bytes:
        frames = []
        for _, _, piece in self._reader.read([(number, tokens)]):
            choice = self._choices[number]
            events, piece = self._take(choice, tokens, piece)
            frames.append(self._chunks(number, choice, events, piece))
            if self.plain:
                self.plain[number].frame = self._plain_frame(number)
        return b"".join(frames)

    def _plain_frame(self, number: int) -> Sequence[bytes]:
        """The chunk of more text of the part that the choice is in, around the text."""
        first, *between, last = self._reasoning if self._reader.in_reasoning(number) else _CONTENT
        return (self._openings[number] + first, *between, last + _NOTHING_MORE)

    def _chunks(self, number: int, choice: _Choice, events: Sequence[Event], piece: Piece) -> bytes:
        """One step's chunks, one per event."""
        opening = self._openings[number]
        deltas = [self._delta(event) for event in events if type(event) is not ToolCallEnd]
        if self._only_deltas and choice.finish_reason is None:
            return b"".join([opening + delta + _NOTHING_MORE for delta in deltas])
        return self._full_chunks(opening, deltas, choice, piece)

    def _full_chunks(self, opening: bytes, deltas: list[bytes], choice: _Choice, piece: Piece) -> bytes:
        """Chunks with logprobs and token ids on the first and the finish reason on the last."""
        shape = self._shape
        logprobs = b"null"
        if shape.num_logprobs is not None and piece.logprobs:
            content = chat_logprobs(piece.logprobs, shape.names, shape.num_logprobs)
            logprobs = orjson.dumps({"content": content})
        token_ids = b',"token_ids":%b' % orjson.dumps(list(piece.token_ids)) if shape.return_token_ids else b""
        if not deltas:
            if choice.finish_reason is None and logprobs == b"null" and not (token_ids and piece.token_ids):
                return b""
            deltas = [b"{}"]
        usage = b',"usage":%b' % orjson.dumps(self._reader.usage.openai()) if shape.continuous_usage else b""
        finish = b"null"
        frames = []
        last = len(deltas) - 1
        for position, delta in enumerate(deltas):
            if position == last and choice.finish_reason is not None:
                finish = orjson.dumps(choice.finish_reason) + b',"stop_reason":%b' % orjson.dumps(choice.stop_reason)
            frames.append(
                b'%b%b,"logprobs":%b,"finish_reason":%b%b}]%b}\n\n'
                % (opening, delta, logprobs, finish, token_ids, usage)
            )
            logprobs, token_ids = b"null", b""
        return b"".join(frames)

    def _delta(self, event: Event) -> bytes:
        if type(event) is ContentDelta:
            return _in_json(event.text).join(_CONTENT)
        if type(event) is ReasoningDelta:
            return _in_json(event.text).join(self._reasoning)
        if type(event) is ToolCallStart:
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.index, "id": new_call_id(), "type": "function", "function": function}
            return orjson.dumps({"tool_calls": [call]})
        assert type(event) is ToolArgumentsDelta
        piece = {"index": event.index, "function": {"arguments": event.text}}
        return orjson.dumps({"tool_calls": [piece]})

    def end(self) -> bytes:
        if not self._shape.include_usage:
            return DONE
        usage = orjson.dumps(self._reader.usage.openai())
        return b'%b"choices":[],"usage":%b}\n\n' % (self._head, usage) + DONE

    def error(self, problem: Problem) -> bytes:
        return b"data: %b\n\n" % orjson.dumps(problem.body()) + DONE

    # Whole

    async def collect(self) -> dict[str, Any]:
        """Read to the end and answer the JSON body."""
        generation = self._reader.generation
        while generation.running:
            for number, tokens, piece in self._reader.read(await generation.wait()):
                choice = self._choices[number]
                self._keep(choice, *self._take(choice, tokens, piece))
        shape = self._shape
        body: dict[str, Any] = {
            "id": shape.response_id,
            "object": "chat.completion",
            "created": shape.created,
            "model": shape.model,
            "choices": [self._whole(number, choice) for number, choice in enumerate(self._choices)],
            "usage": self._reader.usage.openai(),
            "prompt_logprobs": self._prompt_logprobs,
        }
        if shape.return_token_ids:
            body["prompt_token_ids"] = list(self._prompt_ids)
        if shape.prompt_text is not None:
            body["prompt_text"] = shape.prompt_text
        return body

    def _keep(self, choice: _Choice, events: Sequence[Event], piece: Piece) -> None:
        for event in events:
            if isinstance(event, ContentDelta):
                choice.content.append(event.text)
            elif isinstance(event, ReasoningDelta):
                choice.reasoning.append(event.text)
            elif isinstance(event, ToolCallStart):
                function = {"name": event.name, "arguments": ""}
                choice.calls.append({"id": new_call_id(), "type": "function", "function": function})
            elif isinstance(event, ToolArgumentsDelta):
                choice.calls[event.index]["function"]["arguments"] += event.text
        if self._shape.num_logprobs is not None:
            choice.logprobs += chat_logprobs(piece.logprobs, self._shape.names, self._shape.num_logprobs)
        if self._shape.return_token_ids:
            choice.token_ids += piece.token_ids

    def _whole(self, number: int, choice: _Choice) -> dict[str, Any]:
        content = "".join(choice.content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if choice.calls and not content else content,
            "refusal": None,
        }
        reasoning = "".join(choice.reasoning) or None
        for name in self._shape.reasoning_fields:
            message[name] = reasoning
        if choice.calls:
            message["tool_calls"] = choice.calls
        whole: dict[str, Any] = {
            "index": number,
            "message": message,
            "logprobs": None if self._shape.num_logprobs is None else {"content": choice.logprobs},
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._shape.return_token_ids:
            whole["token_ids"] = choice.token_ids
        return whole
