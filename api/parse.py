"""The model's output -> reasoning, content and tool calls, as it arrives.

The same output gives the same result however it is cut, never an exception, and every piece is passed on as soon as
its meaning is certain. What the model gets wrong degrades by fixed rules: a missing `</think>` before a tool block is
supplied, stray markers are dropped or stay text, unclosed tags are closed.
"""

from collections.abc import Sequence

from api.detokenizer import Detokenizer
from api.parse_calls import CallsParser
from api.parse_events import Event, ParserStart, StartState
from api.parse_marks import DSML, MARKS, TextMarks
from api.parse_prose import ProseParser
from api.parse_sink import EventSink
from api.tokenizer import Tokenizer


class OutputParser:
    """Parses one output. Feed it token ids (then only real control tokens count as markers) or text, not both.

    `tools=False`: no tools were offered, so tool markup is plain content.
    """

    def __init__(self, start: ParserStart, *, tools: bool, tokenizer: Tokenizer | None = None) -> None:
        self._sink = EventSink()
        self._prose = ProseParser(self._sink, start, tools=tools)
        self._calls = CallsParser(self._sink)
        self._in_calls = start.state is StartState.TOOL
        self._text_marks = TextMarks()
        self._detokenizer: Detokenizer | None = None
        self._marks: dict[int, str] = {}
        self._prose_of: Sequence[bytes] | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(tokenizer)
            self._prose_of = tokenizer.prose_of
            self._marks = {tokenizer.id_of(spelling): mark for spelling, mark in MARKS.items()}
            self._marks[tokenizer.eos_id] = ""
        self.reasoning_tokens = 0
        """Tokens spent inside the reasoning, its markers not counted. Known only when ids are fed."""
        self._reasoning_before_tag = 0

    @property
    def state(self) -> StartState:
        """The part of the output that the next token belongs to, as far as that is certain."""
        if self._in_calls:
            return StartState.TOOL
        return StartState.REASONING if self._prose.in_reasoning else StartState.CONTENT

    @property
    def num_calls(self) -> int:
        """Tool calls begun so far."""
        return self._sink.num_calls

    @property
    def in_reasoning(self) -> bool:
        return self._prose.in_reasoning and not self._in_calls

    @property
    def plain_words(self) -> Sequence[bytes] | None:
        """id -> JSON text of the tokens that would now be more of the present reasoning or content and nothing else.

        Empty for tokens that must be fed. None: all of them must. It holds until something is fed.
        """
        if self._in_calls or self._detokenizer is None or not (self._prose.is_open and self._detokenizer.is_whole):
            return None
        return self._prose_of

    def took(self, num_tokens: int) -> None:
        """That many tokens were taken as `plain_words` has them, and not fed."""
        if self._prose.in_reasoning:
            self.reasoning_tokens += num_tokens

    def feed(self, token_ids: Sequence[int]) -> list[Event]:
        """Take the next tokens."""
        run: list[int] = []
        for token_id in token_ids:
            mark = self._marks.get(token_id)
            if mark is None:
                run.append(token_id)
                continue
            self._feed_run(run)
            run = []
            self._feed_mark(mark)
        self._feed_run(run)
        return self._sink.drain()

    def feed_text(self, text: str) -> list[Event]:
        """Take the next piece of text, where ids are not known."""
        self._consume(self._text_marks.push(text))
        return self._sink.drain()

    def finish(self, reason: str) -> list[Event]:
        """The output ended: "stop" if the model ended it, anything else if it was cut."""
        self._consume(self._text_marks.finish() + self._unfinished())
        if self._in_calls:
            self._calls.finish(complete=reason == "stop")
        else:
            self._prose.finish()
        return self._sink.drain()

    def _feed_run(self, token_ids: Sequence[int]) -> None:
        """Take tokens without control tokens among them."""
        if not token_ids:
            return
        was_reasoning = self.state is StartState.REASONING
        assert self._detokenizer is not None, "ids are fed, so a tokenizer was given"
        self._consume(self._detokenizer.push(token_ids))
        if not was_reasoning:
            return
        if self.state is StartState.REASONING:
            self.reasoning_tokens += len(token_ids)
        else:
            self.reasoning_tokens = self._reasoning_before_tag

    def _feed_mark(self, mark: str) -> None:
        if mark == DSML and self.state is StartState.REASONING:
            self._reasoning_before_tag = self.reasoning_tokens
            self.reasoning_tokens += 1
        self._consume(self._unfinished() + mark)

    def _unfinished(self) -> str:
        """What stands for a character that a marker or the end cut off."""
        return "" if self._detokenizer is None else self._detokenizer.finish()

    def _consume(self, text: str) -> None:
        if not self._in_calls:
            rest = self._prose.feed(text)
            if rest is None:
                return
            self._in_calls, text = True, rest
        self._calls.feed(text)
