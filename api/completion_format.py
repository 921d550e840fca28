"""The response of /v1/completions, whole and as events."""

from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from api.errors import Problem
from api.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs
from api.plain_text import frames_of
from api.reader import Reader
from api.sse import DONE
from runtime.requests import Submit, Tokens


class CompletionShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller wants to see."""

    response_id: str
    created: int
    model: str
    names: TokenNames
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    prompt_only: bool = False
    """Score the prompt (echo with max_tokens 0): the one token that the engine must generate is not shown."""

    @property
    def head(self) -> dict[str, Any]:
        return {"id": self.response_id, "object": "text_completion", "created": self.created, "model": self.model}


class _Choice:
    """What one choice has shown so far."""

    def __init__(self, submit: Submit, echo_text: str | None, shape: CompletionShape) -> None:
        self.prompt_ids = submit.prompt_ids
        self.echo_text = echo_text
        self.lister = None if shape.num_logprobs is None else CompletionLogprobs(shape.names, shape.num_logprobs)
        self.prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
        self.entries: list[dict[str, Any]] = []


class CompletionResponse:
    """Turns tokens into the choices of a response. `echo_texts`: per choice, the prompt to repeat, or None."""

    def __init__(
        self, reader: Reader, submits: Sequence[Submit], echo_texts: Sequence[str | None], shape: CompletionShape
    ) -> None:
        self._reader = reader
        self._shape = shape
        self._choices = [_Choice(submit, text, shape) for submit, text in zip(submits, echo_texts, strict=True)]
        self._only_text = not (
            shape.num_logprobs is not None or shape.return_token_ids or shape.continuous_usage or shape.prompt_only
        )
        head = orjson.dumps(shape.head)[:-1]
        self.plain = reader.plain if self._only_text else ()
        for number, plain in enumerate(self.plain):
            plain.frame = (b'data: %b,"choices":[{"index":%d,"text":"' % (head, number), _NOTHING_MORE)

    def _read(self, arrived: Sequence[tuple[int, Tokens]]) -> list[tuple[_Choice, dict[str, Any]]]:
        shape = self._shape
        entries = []
        for number, tokens, piece in self._reader.read(arrived):
            choice = self._choices[number]
            text, ids, logprobs = piece.text, list(piece.token_ids), list(piece.logprobs)
            finish_reason, stop_reason = piece.finish_reason, piece.stop_reason
            if shape.prompt_only:
                self._reader.usage.completion_tokens -= len(ids)
                text, ids, logprobs, stop_reason = "", [], [], None
                finish_reason = finish_reason and "length"
            if shape.num_prompt_logprobs is not None and tokens.prompt_logprobs is not None:
                choice.prompt_logprobs = prompt_logprobs(tokens.prompt_logprobs, shape.names, shape.num_prompt_logprobs)
            shown = [*ids]
            listed: list[Any] = logprobs
            if choice.echo_text is not None:
                text = choice.echo_text + text
                choice.echo_text = None
                shown = [*choice.prompt_ids, *ids]
                listed = [*(tokens.prompt_logprobs or [None] * len(choice.prompt_ids)), *logprobs]
            entry: dict[str, Any] = {
                "index": number,
                "text": text,
                "logprobs": None if choice.lister is None else choice.lister.piece(listed, shown),
                "finish_reason": finish_reason,
                "stop_reason": stop_reason,
            }
            if shape.return_token_ids:
                entry["token_ids"] = ids
            entries.append((choice, entry))
        return entries

    # As events

    def start(self) -> bytes:
        return b""

    def feed(self, arrived: Sequence[tuple[int, Tokens]]) -> bytes:
        return frames_of(arrived, self.plain, self._reader.clock(), self._step)

    def _step(self, number: int, tokens: Tokens) -> bytes:
        frames = []
        for _, entry in self._read([(number, tokens)]):
            if entry["text"] or entry["finish_reason"] or entry["logprobs"] or entry.get("token_ids"):
                chunk = {**self._shape.head, "choices": [entry]}
                if self._shape.continuous_usage:
                    chunk["usage"] = self._reader.usage.openai()
                frames.append(_frame(chunk))
        return b"".join(frames)

    def end(self) -> bytes:
        if not self._shape.include_usage:
            return DONE
        return _frame({**self._shape.head, "choices": [], "usage": self._reader.usage.openai()}) + DONE

    def error(self, problem: Problem) -> bytes:
        return _frame(problem.body()) + DONE

    # Whole

    async def collect(self) -> dict[str, Any]:
        """Read to the end and answer the JSON body."""
        generation = self._reader.generation
        while generation.running:
            for choice, entry in self._read(await generation.wait()):
                choice.entries.append(entry)
        choices = [self._merged(choice) for choice in self._choices]
        return {**self._shape.head, "choices": choices, "usage": self._reader.usage.openai()}

    def _merged(self, choice: _Choice) -> dict[str, Any]:
        entries = choice.entries
        logprobs = None
        if choice.lister is not None:
            logprobs = {key: [item for entry in entries for item in entry["logprobs"][key]] for key in _LOGPROB_KEYS}
        merged = {
            **entries[-1],
            "text": "".join(entry["text"] for entry in entries),
            "logprobs": logprobs,
            "prompt_logprobs": choice.prompt_logprobs,
        }
        if self._shape.return_token_ids:
            merged["token_ids"] = [token_id for entry in entries for token_id in entry["token_ids"]]
            merged["prompt_token_ids"] = list(choice.prompt_ids)
        return merged


_NOTHING_MORE = b'","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
_LOGPROB_KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(value)
