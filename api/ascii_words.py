"""Ids of plain ASCII text by looking up its words: several times faster than splitting it in the library.

Only for the splits of the V4 tokenizer (`text_cuts.can_cut`), whose pre-tokens for ASCII text one pattern of the
standard library finds exactly. Ids of a pre-token do not depend on what surrounds it, so each is encoded once.
"""

import re
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Final

MAX_WORDS: Final = 100_000
"""Words remembered; past it all are forgotten."""

_CONTROL: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
# Digits are split off before anything else, so that the end of a text and a digit look the same to the blanks' rule.
_WORD: Final = re.compile(
    r"""[0-9]{1,3}|[!-/:-@\[-`{-~][A-Za-z]+|[ \t\v\f]?[A-Za-z]+|[ ]?[!-/:-@\[-`{-~]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?![^\s0-9])|\s+""",
    re.ASCII,
)


class AsciiWords:
    """Safe to use from several threads: a lost update is a word encoded twice."""

    def __init__(self, encode_words: Callable[[list[str]], Sequence[Sequence[int]]]) -> None:
        """`encode_words` gives the ids of each of several pre-tokens."""
        self._encode_words = encode_words
        self._ids: dict[str, Sequence[int]] = {}

    @staticmethod
    def takes(text: str) -> bool:
        return text.isascii() and _CONTROL.search(text) is None

    def encode(self, text: str) -> "array[int]":
        words = _WORD.findall(text)
        ids_of = self._ids
        missing = [word for word in set(words) if word not in ids_of]
        if missing:
            if len(ids_of) + len(missing) > MAX_WORDS:
                ids_of = self._ids = {word: ids_of[word] for word in set(words) & ids_of.keys()}
            ids_of.update(zip(missing, self._encode_words(missing), strict=True))
        return array("i", chain.from_iterable(map(ids_of.__getitem__, words)))
