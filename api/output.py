"""One choice of a response: token ids in; reasoning, content and tool calls out, until a stop string or the end."""

from collections.abc import Iterable, Sequence

from api.detokenizer import Detokenizer
from api.parse import OutputParser
from api.parse_events import ContentDelta, Event, ParserStart
from api.stop import StopMatcher
from api.tokenizer import Tokenizer


class ChatOutput:
    """The output of a chat. Stop strings are looked for in the answer only: one inside the reasoning or the arguments
    of a call would end the response before there is an answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        start: ParserStart,
        *,
        tools: bool,
        stops: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._parser = OutputParser(start, tools=tools, tokenizer=tokenizer)
        self._stops = StopMatcher(stops, include_stop=include_stop) if stops else None
        self.num_tokens = 0
        """Tokens taken, up to and with the one that completed a stop string."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was found. The rest of the output is of no use: abort the request."""
        return self._stops.stopped_by if self._stops else None

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_tokens

    def push(self, token_ids: Sequence[int]) -> list[Event]:
        """Take the tokens of one step; those after a stop string are ignored."""
        if self._stops is None:
            self.num_tokens += len(token_ids)
            return self._parser.feed(token_ids)
        events: list[Event] = []
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            events += self._until_stop(self._parser.feed((token_id,)))
        return events

    def finish(self, reason: str) -> tuple[list[Event], str]:
        """The engine's output ended for `reason`. Returns the last events and the reason to report."""
        if self.stopped_by is not None:
            return [], "stop"
        events = self._parser.finish(reason)
        if self._stops is not None:
            events = self._until_stop(events)
            held = self._stops.finish()
            if held:
                events.append(ContentDelta(held))
        return events, self._parser.finish_reason(reason)

    def _until_stop(self, events: Iterable[Event]) -> list[Event]:
        assert self._stops is not None
        passed: list[Event] = []
        for event in events:
            if self._stops.stopped_by is not None:
                break
            if isinstance(event, ContentDelta):
                text = self._stops.push(event.text).text
            else:
                text = self._stops.finish()
            if text:
                passed.append(ContentDelta(text))
            if not isinstance(event, ContentDelta):
                passed.append(event)
        return passed


class TextOutput:
    """The output of a text completion: no reasoning and no calls, stop strings anywhere."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        self._stops = StopMatcher(stops, include_stop=include_stop) if stops else None
        self.num_tokens = 0
        """Tokens taken, up to and with the one that completed a stop string."""

    @property
    def stopped_by(self) -> str | None:
        return self._stops.stopped_by if self._stops else None

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the tokens of one step; those after a stop string are ignored."""
        if self._stops is None:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        text = ""
        for token_id in token_ids:
            if self._stops.stopped_by is not None:
                break
            self.num_tokens += 1
            text += self._stops.push(self._detokenizer.push((token_id,))).text
        return text

    def finish(self) -> str:
        """The rest of the text when the engine's output ended."""
        if self._stops is None:
            return self._detokenizer.finish()
        if self._stops.stopped_by is not None:
            return ""
        return self._stops.push(self._detokenizer.finish()).text + self._stops.finish()
