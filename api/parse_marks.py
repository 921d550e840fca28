"""Control tokens inside output text, as one character each.

The parser works on text in which `<think>`, `</think>` and `｜DSML｜` are lone surrogates, which decoded text cannot
contain. Where the token ids are known only real control tokens become such marks, so a model that spells a marker out
(to quote it, say) is not misread; where only text is known every spelling counts.
"""

import re
from typing import Final

from api.encoding import markers

OPEN: Final = "\ud800"
CLOSE: Final = "\ud801"
DSML: Final = "\ud802"
MARKS: Final = {markers.THINK_OPEN: OPEN, markers.THINK_CLOSE: CLOSE, markers.DSML: DSML}

_MARK = re.compile("[\ud800-\ud802]")
_SPELLINGS = {mark: spelling for spelling, mark in MARKS.items()}
_SPELLED = re.compile("|".join(map(re.escape, MARKS)))
_SURROGATE = re.compile("[\ud800-\udfff]")
_PREFIXES = frozenset(spelling[:length] for spelling in MARKS for length in range(1, len(spelling)))
_LONGEST_PREFIX = max(map(len, _PREFIXES))


def spell(text: str) -> str:
    """Put the spelling back in the place of each mark."""
    if _MARK.search(text) is None:
        return text
    return _MARK.sub(lambda found: _SPELLINGS[found.group()], text)


class TextMarks:
    """Turns spelled markers of a text stream into marks, however the stream is cut."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """The text so far, less a tail that may yet become a marker."""
        marked = _SPELLED.sub(lambda found: MARKS[found.group()], self._held + _SURROGATE.sub("\ufffd", text))
        for length in range(min(_LONGEST_PREFIX, len(marked)), 0, -1):
            if marked[-length:] in _PREFIXES:
                self._held = marked[-length:]
                return marked[:-length]
        self._held = ""
        return marked

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held
