"""Collects events in order and joins neighbours that say the same thing."""

from api.parse_events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallEnd, ToolCallStart
from api.parse_marks import spell


class EventSink:
    __slots__ = ("_events", "num_calls")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self.num_calls = 0
        """Tool calls begun so far."""

    def reasoning(self, text: str) -> None:
        if not text:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, ReasoningDelta):
            self._events[-1] = ReasoningDelta(last.text + spell(text))
        else:
            self._events.append(ReasoningDelta(spell(text)))

    def content(self, text: str) -> None:
        if not text:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, ContentDelta):
            self._events[-1] = ContentDelta(last.text + spell(text))
        else:
            self._events.append(ContentDelta(spell(text)))

    def begin_call(self, name: str) -> None:
        self._events.append(ToolCallStart(self.num_calls, spell(name)))
        self.num_calls += 1

    def arguments(self, json_text: str) -> None:
        """A piece of the current call's arguments, which is JSON text already."""
        if not json_text:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, ToolArgumentsDelta):
            self._events[-1] = ToolArgumentsDelta(last.index, last.text + json_text)
        else:
            self._events.append(ToolArgumentsDelta(self.num_calls - 1, json_text))

    def end_call(self) -> None:
        self._events.append(ToolCallEnd(self.num_calls - 1))

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events
