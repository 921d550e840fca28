"""Token ids to text as they arrive: constant work per token, and never half a character."""

import codecs
from collections.abc import Sequence

from api.tokenizer import Tokenizer, join_bytes


class Detokenizer:
    """Text of one output. What its methods return, joined, equals `Tokenizer.decode` for any grouping."""

    __slots__ = ("_bytes_of", "_decoder", "_is_whole", "_text_of")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._bytes_of = tokenizer.visible_bytes_of if skip_special else tokenizer.bytes_of
        self._text_of = tokenizer.text_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_whole = True
        """No character is unfinished."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is complete now; the bytes of an unfinished character wait for the next call."""
        text = self._decoder.decode(join_bytes(self._bytes_of, token_ids))
        self._is_whole = not self._decoder.getstate()[0]
        return text

    def plain(self, token_ids: Sequence[int]) -> str:
        """What `push` would return, if no character is unfinished before and after and no control token is among them.

        Otherwise nothing, and then nothing was taken. Nearly every token of an answer is plain, and looking its text up
        costs a fraction of decoding it.
        """
        if not self._is_whole:
            return ""
        text_of = self._text_of
        try:
            if len(token_ids) == 1:
                return text_of[token_ids[0]]
            texts = [text_of[token_id] for token_id in token_ids]
        except IndexError:
            return ""
        return "".join(texts) if all(texts) else ""

    def finish(self) -> str:
        """The rest, with U+FFFD in the place of a character that never became whole."""
        self._is_whole = True
        return self._decoder.decode(b"", True)
