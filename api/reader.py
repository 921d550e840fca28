"""Reads what the engine generates for one HTTP request: to text, counted, timed, stopped at stop strings."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from api.context import Context
from api.generation import Generation
from api.metrics import RequestTimer
from api.submission import Submission
from api.text_output import Piece
from api.usage import Usage
from runtime.requests import Tokens


class Output(Protocol):
    """One choice's way from tokens to text: `TextOutput` or `ChatOutput`."""

    @property
    def in_reasoning(self) -> bool: ...

    def plain(self, token_ids: Sequence[int]) -> str: ...

    def feed(self, tokens: Tokens) -> Piece: ...


class _Timer(Protocol):
    def tokens(self, count: int, now: float) -> None: ...

    def end(self, reason: str, num_prompt: int, num_cached: int) -> None: ...


class _NoTimer:
    """Measures nothing."""

    def tokens(self, count: int, now: float) -> None:
        pass

    def end(self, reason: str, num_prompt: int, num_cached: int) -> None:
        pass


class Reader:
    """The choices of one request, numbered as they were submitted; `outputs` has one entry for each."""

    def __init__(
        self,
        context: Context,
        submission: Submission,
        generation: Generation,
        outputs: Sequence[Output],
        *,
        arrived: float,
    ) -> None:
        rank = generation.rank
        self.generation = generation
        self.unix_time = context.unix_time
        self.usage = Usage(submission.num_prompt_tokens, submission.choices_per_prompt)
        self._clock = asyncio.get_running_loop().time
        self._prompt_lengths = [len(submit.prompt_ids) for submit in submission.submits]
        self._outputs: list[Output | None] = list(outputs)
        self.in_reasoning = False
        """Whether the text that `plain` returned last is reasoning."""
        self._timers: list[_Timer] = [RequestTimer(context.metrics, rank, arrived) for _ in submission.submits]
        context.metrics.observe("request_params_n", rank, submission.choices_per_prompt)
        context.metrics.observe("request_params_max_tokens", rank, submission.submits[0].sampling.max_tokens)

    def read(self, arrived: Sequence[tuple[int, Tokens]]) -> list[tuple[int, Tokens, Piece]]:
        """What one wake-up brought. A choice that a stop string ended is stopped in the engine too."""
        now = self._clock()
        pieces = []
        for number, tokens in arrived:
            output = self._outputs[number]
            if output is None:
                continue
            piece = output.feed(tokens)
            if tokens.prompt_tokens:
                self.usage.prompt_seen(number, tokens)
            self.usage.completion_tokens += len(piece.token_ids)
            self.usage.reasoning_tokens += piece.num_reasoning
            self._timers[number].tokens(len(piece.token_ids), now)
            if piece.finish_reason is not None:
                self._end(number, piece)
            pieces.append((number, tokens, piece))
        return pieces

    def plain(self, number: int, tokens: Tokens) -> str:
        """The text of a step that has nothing but text, which is nearly every one. Empty: not read, `read` must."""
        output = self._outputs[number]
        if output is None or tokens.finish_reason is not None or tokens.prompt_tokens:
            return ""
        text = output.plain(tokens.token_ids)
        if text:
            count = len(tokens.token_ids)
            self.usage.completion_tokens += count
            self.in_reasoning = output.in_reasoning
            if self.in_reasoning:
                self.usage.reasoning_tokens += count
            self._timers[number].tokens(count, self._clock())
        return text

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Inside, what is read was generated and timed elsewhere: it counts as usage, not as this node's work."""
        timers, self._timers = self._timers, [_NoTimer()] * len(self._timers)
        try:
            yield
        finally:
            self._timers = timers

    def _end(self, number: int, piece: Piece) -> None:
        assert piece.finish_reason is not None
        self._outputs[number] = None
        if piece.stopped_early:
            self.generation.stop(number)
        cached = self.usage.cached_of(number)
        self._timers[number].end(piece.finish_reason, self._prompt_lengths[number], cached)

    def close(self) -> None:
        """The request is over, in whatever way: choices without an end count as aborted."""
        for number, output in enumerate(self._outputs):
            if output is not None:
                self._outputs[number] = None
                self._timers[number].end("abort", self._prompt_lengths[number], self.usage.cached_of(number))
