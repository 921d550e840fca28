"""The short way of a step that is only more text, which nearly every step of an answer is.

With hundreds of streams in turn nothing of one stream is in a cache when its token comes, so what a token costs is what
it touches. A plain step touches this one object between the engine's message and the bytes for the client; what it has
taken is counted when the next step that is more than text is read.
"""

from collections.abc import Callable, Sequence

from runtime.histogram import Histogram
from runtime.requests import Tokens


class PlainText:
    """One choice, as long as its steps are nothing but more text of the part that it is in.

    Closed at first. The reader opens it after each step that it has read, if the state after it allows.
    """

    __slots__ = ("_gaps", "_words", "frame", "last", "num_tokens")

    def __init__(self, gaps: Histogram) -> None:
        """`gaps`: where times between steps are observed."""
        self._gaps = gaps
        self._words: Sequence[bytes] | None = None
        self.frame: Sequence[bytes] = (b"", b"")
        """What an event has before, between and after each place of the text; set by whoever writes the events."""
        self.num_tokens = 0
        """Taken and not counted yet."""
        self.last = 0.0
        """When the last step came, in event loop time."""

    def open(self, words: Sequence[bytes] | None, now: float) -> None:
        """From now on take steps of ids that `words` has text for, as it stands in a JSON string. None: take none."""
        self._words = words
        self.last = now

    def close(self) -> None:
        """Take no step until it is opened again."""
        self._words = None

    def take(self, tokens: Tokens, now: float) -> bytes:
        """The event of a step. Nothing, if the step may be more than text: then it was not taken and must be read."""
        words = self._words
        if words is None or tokens.finish_reason is not None or tokens.prompt_tokens:
            return b""
        token_ids = tokens.token_ids
        try:
            if len(token_ids) == 1:
                text = words[token_ids[0]]
            else:
                texts = [words[token_id] for token_id in token_ids]
                text = b"".join(texts) if all(texts) else b""
        except IndexError:
            return b""
        if not text:
            return b""
        self.num_tokens += len(token_ids)
        self._gaps.observe(now - self.last)
        self.last = now
        return text.join(self.frame)


def frames_of(
    arrived: Sequence[tuple[int, Tokens]],
    plain: Sequence[PlainText],
    now: float,
    read: Callable[[int, Tokens], bytes],
) -> bytes:
    """The events of steps that came together: of each the plain one, if it is that, else what `read` makes of it."""
    return b"".join(
        [(plain[number].take(tokens, now) if plain else b"") or read(number, tokens) for number, tokens in arrived]
    )
