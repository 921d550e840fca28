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
    """The state between steps. `hide_reasoning`: pieces tell which of their tokens belong to the reasoning."""

    __slots__ = ("_eos_id", "_hide", "_is_unsearched", "_matcher", "_num_tokens", "_parser", "_rules")

    def __init__(
        self, tokenizer: Tokenizer, rules: TextRules, start: ParserStart, *, tools: bool, hide_reasoning: bool = False
    ) -> None:
        self._rules = rules
        self._eos_id = tokenizer.eos_id
        self._parser = OutputParser(start, tools=tools, tokenizer=tokenizer)
        self._matcher = StopMatcher(rules.stops, include_stop=rules.include_stop) if rules.stops else None
        self._hide = hide_reasoning
        self._is_unsearched = self._matcher is None and not hide_reasoning
        self._num_tokens = 0

    @property
    def in_reasoning(self) -> bool:
        """Whether plain text belongs to the reasoning now."""
        return self._parser.in_reasoning

    @property
    def plain_words(self) -> Sequence[bytes] | None:
        """What `OutputParser.plain_words` says, unless stop strings or tokens to hide are looked for."""
        return self._parser.plain_words if self._is_unsearched else None

    def took(self, num_tokens: int) -> None:
        """That many tokens were taken as `plain_words` has them, and not fed."""
        self._parser.took(num_tokens)

    def feed(self, tokens: Tokens) -> Piece:
        """The next step. Nothing may be fed after a piece with a finish reason."""
        before = self._parser.reasoning_tokens
        visible = visible_ids(tokens, self._eos_id, self._rules)
        num_used, num_hidden = len(tokens.token_ids), 0
        events: list[Event] = []
        if self._is_unsearched:
            events = self._parser.feed(visible)
        else:
            for position, token_id in enumerate(visible, start=1):
                num_hidden += self._parser.state is StartState.REASONING
                self._num_tokens += 1
                self._search(self._parser.feed((token_id,)), events)
                if self._stopped_by is not None:
                    num_used = position
                    break
        finish_reason = tokens.finish_reason
        if finish_reason is not None and self._stopped_by is None:
            self._search(self._parser.finish(finish_reason), events)
            self._release(events)
        stopped_by = self._stopped_by
        return Piece(
            tokens.token_ids[:num_used],
            tokens.logprobs[:num_used],
            events=events,
            finish_reason=finish_reason if stopped_by is None else "stop",
            stop_reason=tokens.stop_token_id if stopped_by is None else stopped_by,
            num_reasoning=self._parser.reasoning_tokens - before,
            num_hidden=num_hidden if self._hide else 0,
        )

    @property
    def _stopped_by(self) -> str | None:
        return None if self._matcher is None else self._matcher.stopped_by

    def _search(self, new: Sequence[Event], events: list[Event]) -> None:
        """Move `new` to `events`, as far as no stop string ends them."""
        if self._matcher is None:
            events += new
            return
        for event in new:
            if not isinstance(event, ContentDelta):
                # What was held back as a possible beginning of a stop string comes before anything else.
                self._release(events)
                events.append(event)
            elif self._num_tokens <= self._rules.min_tokens:
                events.append(event)
            else:
                _append_content(events, self._matcher.push(event.text).text)
                if self._matcher.stopped_by is not None:
                    return

    def _release(self, events: list[Event]) -> None:
        if self._matcher is not None and self._matcher.stopped_by is None:
            _append_content(events, self._matcher.finish())


def _append_content(events: list[Event], text: str) -> None:
    if text:
        events.append(ContentDelta(text))
