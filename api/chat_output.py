"""One choice of a chat: tokens to reasoning, content and tool calls, cut at the first stop string of the content.

Stop strings are searched in the answer only, as DeepSeek's API does: one that turns up while the model still reasons
must not take the answer away.
"""

from collections.abc import Sequence

from api.parse import OutputParser
from api.parse_events import ContentDelta, Event, ParserStart, StartState
from api.stop import StopMatcher
from api.text_output import Piece, TextRules, visible_ids
from api.tokenizer import Tokenizer
from runtime.requests import Tokens


class ChatOutput:
    """The state between steps."""

    __slots__ = ("_eos_id", "_matcher", "_num_tokens", "_rules", "parser")

    def __init__(self, tokenizer: Tokenizer, rules: TextRules, start: ParserStart, *, tools: bool) -> None:
        self._rules = rules
        self._eos_id = tokenizer.eos_id
        self.parser = OutputParser(start, tools=tools, tokenizer=tokenizer)
        self._matcher = StopMatcher(rules.stops, include_stop=rules.include_stop) if rules.stops else None
        self._num_tokens = 0

    @property
    def in_reasoning(self) -> bool:
        return self.parser.state is StartState.REASONING

    def feed(self, tokens: Tokens) -> Piece:
        """The next step. Nothing may be fed after a piece with a finish reason."""
        before = self.parser.reasoning_tokens
        visible = visible_ids(tokens, self._eos_id, self._rules)
        if self._matcher is not None:
            return self._feed_searching(tokens, visible, self._matcher, before)
        events = self.parser.feed(visible)
        if tokens.finish_reason is not None:
            events += self.parser.finish(tokens.finish_reason)
        return self._whole_step(tokens, events, before)

    def _feed_searching(self, tokens: Tokens, visible: Sequence[int], matcher: StopMatcher, before: int) -> Piece:
        events: list[Event] = []
        for position, token_id in enumerate(visible, start=1):
            self._num_tokens += 1
            self._search(self.parser.feed((token_id,)), events, matcher)
            if matcher.stopped_by is not None:
                return self._stopped(tokens, position, events, matcher.stopped_by, before)
        if tokens.finish_reason is None:
            return self._whole_step(tokens, events, before)
        self._search(self.parser.finish(tokens.finish_reason), events, matcher)
        if matcher.stopped_by is not None:
            return self._stopped(tokens, len(tokens.token_ids), events, matcher.stopped_by, before)
        _append_content(events, matcher.finish())
        return self._whole_step(tokens, events, before)

    def _search(self, new: Sequence[Event], events: list[Event], matcher: StopMatcher) -> None:
        """Move `new` to `events` as far as no stop string ends them."""
        for event in new:
            if not isinstance(event, ContentDelta):
                # What was held back as a possible beginning of a stop string comes before anything else.
                _append_content(events, matcher.finish())
                events.append(event)
            elif self._num_tokens <= self._rules.min_tokens:
                events.append(event)
            else:
                _append_content(events, matcher.push(event.text).text)
                if matcher.stopped_by is not None:
                    return

    def _stopped(self, tokens: Tokens, position: int, events: Sequence[Event], found: str, before: int) -> Piece:
        return Piece(
            tokens.token_ids[:position],
            tokens.logprobs[:position],
            events=events,
            finish_reason="stop",
            stop_reason=found,
            num_reasoning=self.parser.reasoning_tokens - before,
        )

    def _whole_step(self, tokens: Tokens, events: Sequence[Event], before: int) -> Piece:
        return Piece(
            tokens.token_ids,
            tokens.logprobs,
            events=events,
            finish_reason=tokens.finish_reason,
            stop_reason=tokens.stop_token_id,
            num_reasoning=self.parser.reasoning_tokens - before,
        )


def _append_content(events: list[Event], text: str) -> None:
    if text:
        events.append(ContentDelta(text))
