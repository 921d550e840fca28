"""The short way of a step that is only more text, which nearly every step of an answer is.

With hundreds of streams in turn nothing of one stream is in a cache when its token comes, so what a token costs is what
it touches. A plain step touches this one object between the engine's message and the bytes for the client; what it has
taken is counted when the next step that is more than text is read.
"""

import asyncio
from collections.abc import Callable, Sequence

from api.turn import Turn
from runtime.histogram import Histogram
from runtime.requests import Tokens

Enclose = Callable[[bytes, Sequence[int]], bytes]
"""From an event, and the ids that it comes from, to what is written of it."""


def _as_it_is(event: bytes, _: Sequence[int]) -> bytes:
    return event


class PlainText:
    """One choice, as long as its steps are nothing but more text of the part that it is in.

    Closed at first. The reader opens it after each step that it has read, if the state after it allows.
    """

    __slots__ = ("_enclose", "_gaps", "_transport", "_turn", "_words", "frame", "last", "num_tokens", "written")

    def __init__(self, gaps: Histogram) -> None:
        """`gaps`: where times between steps are observed."""
        self._gaps = gaps
        self._words: Sequence[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._turn: Turn | None = None
        self._enclose: Enclose = _as_it_is
        self.frame: Sequence[bytes] = (b"", b"")
        """What an event has before, between and after each place of the text; set by whoever writes the events."""
        self.num_tokens = 0
        """Taken and not counted yet."""
        self.last = 0.0
        """When the last step came, in event loop time."""
        self.written = 0.0
        """When `write` last wrote."""

    def open(self, words: Sequence[bytes] | None, now: float) -> None:
        """From now on take steps of ids that `words` has text for, as it stands in a JSON string. None: take none."""
        self._words = words
        self.last = now

    def close(self) -> None:
        """Take no step until it is opened again."""
        self._words = None

    def lead_to(self, transport: asyncio.Transport, turn: Turn, enclose: Enclose) -> None:
        """From now on `write` gives events to `transport`, as `enclose` makes them of an event and its ids."""
        self._transport = transport
        self._turn = turn
        self._enclose = enclose

    def lead_nowhere(self) -> None:
        """`write` takes nothing until the next `lead_to`."""
        self._transport = self._turn = None
        self._enclose = _as_it_is

    def write(self, tokens: Tokens) -> bool:
        """Take a step and write it, unless it may be more than text or something waits to be written before it."""
        transport, turn = self._transport, self._turn
        if transport is None or turn is None or transport.get_write_buffer_size():
            return False
        now = turn.time()
        event = self.take(tokens, now)
        if not event:
            return False
        self.written = now
        turn.write(transport, self._enclose(event, tokens.token_ids))
        return True

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
