"""A prompt as a sequence of control tokens and plain text.

Plain text is tokenised with the added vocabulary off, so nothing a caller writes can become a control token.
Adjacent plain text is one segment, whoever wrote it: BPE merges across such seams, so cutting there would change ids.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Segment(NamedTuple):
    """One control token (`is_marker`, spelled by `text`) or one run of plain text."""

    text: str
    is_marker: bool


Segments = tuple[Segment, ...]


class PromptBuilder:
    """Collects a prompt from left to right."""

    __slots__ = ("_plain", "_segments")

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._plain: list[str] = []

    def marker(self, text: str) -> None:
        self._flush()
        self._segments.append(Segment(text, True))

    def text(self, text: str) -> None:
        self._plain.append(text)

    def template(self, pieces: Iterable[str]) -> None:
        """Append a text of ours cut by `markers.split_template`."""
        for position, piece in enumerate(pieces):
            if position % 2:
                self.marker(piece)
            else:
                self.text(piece)

    def build(self) -> Segments:
        self._flush()
        return tuple(self._segments)

    def _flush(self) -> None:
        text = "".join(self._plain)
        self._plain.clear()
        if text:
            self._segments.append(Segment(text, False))


def prompt_text(segments: Segments) -> str:
    """The prompt as one string, control tokens spelled out."""
    return "".join(segment.text for segment in segments)
