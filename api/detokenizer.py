"""Token ids to text as they arrive: constant work per token, and never half a character."""

import codecs
from collections.abc import Sequence

from api.tokenizer import Tokenizer, join_bytes


class Detokenizer:
    """Text of one output. What its methods return, joined, equals `Tokenizer.decode` for any grouping."""

    __slots__ = ("_bytes_of", "_decoder", "is_whole")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._bytes_of = tokenizer.visible_bytes_of if skip_special else tokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_whole = True
        """No character is unfinished: a token of whole characters would not change anything here."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is complete now; the bytes of an unfinished character wait for the next call."""
        text = self._decoder.decode(join_bytes(self._bytes_of, token_ids))
        self.is_whole = not self._decoder.getstate()[0]
        return text

    def finish(self) -> str:
        """The rest, with U+FFFD in the place of a character that never became whole."""
        self.is_whole = True
        return self._decoder.decode(b"", True)
