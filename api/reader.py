"""Reads what the engine generates for one HTTP request: to text, counted, timed, stopped at stop strings."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from api.context import Context
from api.generation import Generation
from api.metrics import RequestTimer
from api.plain_text import PlainText
from api.submission import Submission
from api.text_output import Piece
from api.usage import Usage
from runtime.requests import Tokens


class Output(Protocol):
    """One choice's way from tokens to text: `TextOutput` or `ChatOutput`."""

    @property
    def in_reasoning(self) -> bool: ...

    @property
    def plain_words(self) -> Sequence[bytes] | None: ...

    def took(self, num_tokens: int) -> None: ...

    def feed(self, tokens: Tokens) -> Piece: ...


class _Timer(Protocol):
    def tokens(self, count: int, now: float) -> None: ...

    def timed(self, count: int, last: float) -> None: ...

    def end(self, reason: str, num_prompt: int, num_cached: int) -> None: ...


class _NoTimer:
    """Measures nothing."""

    def tokens(self, count: int, now: float) -> None:
        pass

    def timed(self, count: int, last: float) -> None:
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
        self.clock = asyncio.get_running_loop().time
        self._prompt_lengths = [len(submit.prompt_ids) for submit in submission.submits]
        self._outputs: list[Output | None] = list(outputs)
        self.plain = tuple(PlainText(context.metrics.inter_token(rank)) for _ in submission.submits)
        """For each choice: takes the steps that need no reading."""
        self._timers: list[_Timer] = [RequestTimer(context.metrics, rank, arrived) for _ in submission.submits]
        context.metrics.observe("request_params_n", rank, submission.choices_per_prompt)
        context.metrics.observe("request_params_max_tokens", rank, submission.submits[0].sampling.max_tokens)

    def read(self, arrived: Sequence[tuple[int, Tokens]]) -> list[tuple[int, Tokens, Piece]]:
        """What one wake-up brought. A choice that a stop string ended is stopped in the engine too."""
        now = self.clock()
        pieces = []
        for number, tokens in arrived:
            output = self._outputs[number]
            if output is None:
                continue
            self._count_plain(number, output)
            piece = output.feed(tokens)
            if tokens.prompt_tokens:
                self.usage.prompt_seen(number, tokens)
            self.usage.completion_tokens += len(piece.token_ids)
            self.usage.reasoning_tokens += piece.num_reasoning
            self._timers[number].tokens(len(piece.token_ids), now)
            if piece.finish_reason is not None:
                self._end(number, piece)
            else:
                self.plain[number].open(output.plain_words, now)
            pieces.append((number, tokens, piece))
        return pieces

    def in_reasoning(self, number: int) -> bool:
        """Whether the next plain text of this choice belongs to the reasoning."""
        output = self._outputs[number]
        return output is not None and output.in_reasoning

    def _count_plain(self, number: int, output: Output) -> None:
        """Count what was taken without reading since the last step that was read."""
        plain = self.plain[number]
        count, plain.num_tokens = plain.num_tokens, 0
        if not count:
            return
        self.usage.completion_tokens += count
        if output.in_reasoning:
            self.usage.reasoning_tokens += count
        self._timers[number].timed(count, plain.last)
        output.took(count)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Inside, what is read was generated and timed elsewhere: it counts as usage, not as this node's work."""
        timers, self._timers = self._timers, [_NoTimer()] * len(self._timers)
        try:
            yield
        finally:
            self._timers = timers
            for plain in self.plain:
                # The first step that is seen is read: it is the first one that counts.
                plain.close()

    def _end(self, number: int, piece: Piece) -> None:
        assert piece.finish_reason is not None
        self._outputs[number] = None
        self.plain[number].close()
        if piece.stopped_early:
            self.generation.stop(number)
        cached = self.usage.cached_of(number)
        self._timers[number].end(piece.finish_reason, self._prompt_lengths[number], cached)

    def close(self) -> None:
        """The request is over, in whatever way: choices without an end count as aborted."""
        for number, output in enumerate(self._outputs):
            if output is not None:
                self._count_plain(number, output)
                self._outputs[number] = None
                self._timers[number].end("abort", self._prompt_lengths[number], self.usage.cached_of(number))
