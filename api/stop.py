"""Stop strings in a text stream: nothing that may yet be part of one is let through."""

from collections.abc import Sequence

import msgspec


class StopResult(msgspec.Struct, frozen=True, gc=False):
    """Text that may be passed on, and the stop string that ended the stream, if one did."""

    text: str
    stopped_by: str | None = None


class StopMatcher:
    """Looks for several stop strings at once. The one that is complete first wins, and of those the longest.

    The result does not depend on how the text is cut. After a match nothing more is let through.
    """

    __slots__ = ("_first_chars", "_held", "_include", "_longest", "_stops", "stopped_by")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """`include_stop` passes the stop string itself on. Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._include = include_stop
        self._longest = max(map(len, self._stops), default=1)
        self._first_chars = frozenset(stop[0] for stop in self._stops)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str) -> StopResult:
        if self.stopped_by is not None:
            return StopResult("", self.stopped_by)
        text = self._held + text
        places = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            end, at, self.stopped_by = min(places)
            self._held = ""
            return StopResult(text[: end if self._include else at], self.stopped_by)
        keep = self._safe_length(text)
        self._held = text[keep:]
        return StopResult(text[:keep])

    def finish(self) -> str:
        """The stream ended: what was held was no stop string."""
        held, self._held = self._held, ""
        return held

    def _safe_length(self, text: str) -> int:
        """Where the longest tail begins that is the start of a stop string."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first_chars:
                tail = text[at:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return at
        return len(text)
