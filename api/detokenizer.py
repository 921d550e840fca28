"""Token ids to text as they arrive: constant work per token, and never half a character."""

import codecs
from collections.abc import Iterable

from api.tokenizer import Tokenizer, join_bytes


class Detokenizer:
    """Text of one output. What `push` and `finish` return, joined, equals `Tokenizer.decode` for any grouping."""

    __slots__ = ("_bytes_of", "_decode")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._bytes_of = tokenizer.visible_bytes_of if skip_special else tokenizer.bytes_of
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is complete now; the bytes of an unfinished character wait for the next call."""
        return self._decode(join_bytes(self._bytes_of, token_ids))

    def finish(self) -> str:
        """The rest, with U+FFFD in the place of a character that never became whole."""
        return self._decode(b"", True)
