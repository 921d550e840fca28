"""The part of an output before any tool call: reasoning, then content.

Newlines between the parts belong to neither: they are held back until it is known what follows them.
"""

import enum
import re
from typing import Final

from api.parse_events import ParserStart, StartState
from api.parse_marks import CLOSE, DSML, OPEN
from api.parse_sink import EventSink

BLOCK_NAMES: Final = ("tool_calls", "toolcalls", "tool", "function_calls")
"""The released spelling of the block's tag first, then those that models are known to slip into."""

_CLOSE: Final = re.compile(CLOSE)
_CLOSE_OR_TAG: Final = re.compile(f"{CLOSE}|<{DSML}")
_OPENER: Final = re.compile(f'(?P<block>(?:{"|".join(BLOCK_NAMES)})[ \\t]{{0,4}}>)|invoke name="')
_OPENER_PREFIX: Final = re.compile(f"(?:{'|'.join(BLOCK_NAMES)})[ \\t]{{0,4}}")
_OPENER_SPELLINGS: Final = (*BLOCK_NAMES, 'invoke name="')


class Opener(enum.Enum):
    """What a `<｜DSML｜` in prose turns out to be."""

    YES = enum.auto()
    NOT_YET = enum.auto()
    NO = enum.auto()


class ProseParser:
    def __init__(self, sink: EventSink, start: ParserStart, *, tools: bool) -> None:
        self._sink = sink
        self._tools = tools
        self.in_reasoning = start.state is StartState.REASONING
        self._fresh = not start.continuation
        """Nothing of this part has appeared yet, so newlines are dropped."""
        self._may_open = not start.continuation
        """A first `<think>` opens the reasoning, or repeats what the prompt did; later ones are text."""
        self._newlines = 0
        """Held back, before `_held`: as a number, because a model may write nothing but newlines for long."""
        self._held = ""
        self._stops = _CLOSE_OR_TAG if tools else _CLOSE

    @property
    def is_open(self) -> bool:
        """Inside a part, with nothing held back: text without markers and uncertain ends goes straight through."""
        return not (self._fresh or self._newlines or self._held)

    def feed(self, text: str) -> str | None:
        """Take more text. Returns what follows the opener of a tool block once there is one."""
        text = self._skip_start(self._held + text)
        self._held = ""
        position = 0
        while found := self._stops.search(text, position):
            at = found.start()
            if found.group() == CLOSE:
                text, position = self._close(text, at), 0
                continue
            opener, end = self._opener(text, at)
            if opener is Opener.NO:
                position = found.end()
                continue
            self._emit_but_newlines(text[:at])
            if opener is Opener.YES:
                return text[end:]
            self._held = text[at:]
            return None
        if self._tools and text.endswith("<"):
            text, self._held = text[:-1], "<"
        if self._tools or self.in_reasoning:
            self._emit_but_newlines(text)
        else:
            self._emit(text)
        return None

    def finish(self) -> None:
        """The output ended. The beginning of an opener is dropped with its newlines, other held text was text."""
        if DSML not in self._held:
            self._emit(self._held)
        self._held = ""

    def _skip_start(self, text: str) -> str:
        if not self._fresh:
            return text
        text = text.lstrip("\n")
        if self._may_open and text.startswith(OPEN):
            self.in_reasoning = True
            self._may_open = False
            text = text[1:].lstrip("\n")
        if text:
            self._fresh = self._may_open = False
        return text

    def _close(self, text: str, at: int) -> str:
        """`</think>`: the end of the reasoning; a stray one inside content leaves no trace."""
        if not self.in_reasoning:
            self._emit(text[:at])
            return text[at + 1 :]
        self._emit_but_newlines(text[:at])
        self._newlines = 0
        self.in_reasoning = False
        self._fresh = True
        return self._skip_start(text[at + 1 :])

    def _opener(self, text: str, at: int) -> tuple[Opener, int]:
        begin = at + 2
        found = _OPENER.match(text, begin)
        if found is not None:
            return Opener.YES, found.end() if found["block"] else at
        rest = text[begin:]
        if any(spelling.startswith(rest) for spelling in _OPENER_SPELLINGS) or _OPENER_PREFIX.fullmatch(rest):
            return Opener.NOT_YET, at
        return Opener.NO, at

    def _emit_but_newlines(self, text: str) -> None:
        """Emit a text, but hold back the newlines it ends with, which a marker may follow."""
        body = text.rstrip("\n")
        if body:
            self._emit(body)
        self._newlines += len(text) - len(body)

    def _emit(self, text: str) -> None:
        text, self._newlines = "\n" * self._newlines + text, 0
        if self.in_reasoning:
            self._sink.reasoning(text)
        else:
            self._sink.content(text)
