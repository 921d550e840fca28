"""From the engine's queue to the socket: what sends the events of a stream once it has begun."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from aiohttp import HttpVersion11, web

from api.errors import Problem
from api.generation import Generation
from api.plain_text import PlainText
from api.resume import ids_of, note
from runtime.requests import Tokens

KEEP_ALIVE = b": keep-alive\n\n"
_SIZES = tuple(b"%x\r\n" % size for size in range(1024))
"""What begins a chunk, of any size that the event of a single token has. Formatting it costs more than the rest."""


def chunk_of(event: bytes, _: Sequence[int]) -> bytes:
    """An event as one HTTP chunk."""
    size = len(event)
    return (_SIZES[size] if size < len(_SIZES) else b"%x\r\n" % size) + event + b"\r\n"


class EventWriter(Protocol):
    """Turns tokens into the events of one API. Every method answers complete SSE frames, or nothing."""

    @property
    def plain(self) -> Sequence[PlainText]:
        """For each choice what writes the frames of steps that are only more text. Empty: every step must be fed."""
        ...

    def start(self) -> bytes:
        """What comes first, before any token."""
        ...

    def feed(self, arrived: Sequence[tuple[int, Tokens]]) -> bytes:
        """The frames of what one wake-up brought."""
        ...

    def end(self) -> bytes:
        """What comes last, after every choice has ended."""
        ...

    def error(self, problem: Problem) -> bytes:
        """What ends a stream that failed after it began."""
        ...


class Pulse:
    """Wakes a silent stream every `period_s`. One timer per stream, moved only when it fires."""

    __slots__ = ("_generation", "_loop", "_period_s", "_timer", "last", "plain")

    def __init__(self, generation: Generation, period_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._generation = generation
        self._period_s = period_s
        self.last = self._loop.time()
        """When something was sent."""
        self.plain: PlainText | None = None
        """Sends too, and knows when."""
        self._timer = self._loop.call_later(period_s, self._fire)

    def is_due(self) -> bool:
        return self._silent_s() >= self._period_s

    def _silent_s(self) -> float:
        last = self.last if self.plain is None else max(self.last, self.plain.written)
        return self._loop.time() - last

    def _fire(self) -> None:
        silent_s = self._silent_s()
        if silent_s >= self._period_s:
            self._generation.wake()
            silent_s = 0.0
        self._timer = self._loop.call_later(self._period_s - silent_s, self._fire)

    def stop(self) -> None:
        self._timer.cancel()


class Pump:
    """From the engine's message to the socket in plain calls, while the handler's coroutine sleeps.

    With hundreds of streams in turn, resuming a handler for each token costs more than everything done with it. So the
    frames go straight to the transport, each as one HTTP chunk, once aiohttp has sent the headers: those of a step that
    is only more text while the engine's message is taken apart, all others once per turn of the event loop. The
    coroutine is woken at the end, for an error, and when the client is so slow that the transport's buffer is full.
    """

    __slots__ = (
        "_clock", "_error", "_generation", "_is_chunked", "_is_noted", "_is_over", "_is_stopped", "_needs_care",
        "_plain", "_protocol", "_pulse", "_rest", "_transport", "_turn", "_unnoted", "_writer",
    )  # fmt: skip

    def __init__(
        self,
        request: web.Request,
        generation: Generation,
        writer: EventWriter,
        pulse: Pulse,
        *,
        is_noted: bool,
    ) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        self._transport = transport
        self._protocol = request.protocol
        self._is_chunked = request.version >= HttpVersion11
        self._generation = generation
        self._turn = generation.turn
        self._writer = writer
        self._pulse = pulse
        self._is_noted = is_noted and self._is_chunked
        self._unnoted: list[int] = []
        """Tokens that made no chunk: their text is held back. They are noted with the next one."""
        self._needs_care: asyncio.Future[None] | None = None
        self._clock = asyncio.get_running_loop().time
        self._plain = pulse.plain = writer.plain[0] if len(writer.plain) == 1 else None
        """Several choices are read together, so that they leave in one write."""
        self._is_stopped = False
        """Nothing may be written: the client has not read what it got, or this is over."""
        self._is_over = False
        self._error: Exception | None = None
        self._rest: tuple[bytes, Sequence[tuple[int, Tokens]]] = b"", ()

    def send(self, data: bytes, arrived: Sequence[tuple[int, Tokens]], *, last: bool = False) -> None:
        """Write frames as one chunk, with a note of the tokens they come from where that was asked for."""
        if chunk := self._chunk(data, ids_of(arrived), last=last):
            self._transport.write(chunk)
            self._pulse.last = self._clock()

    def _chunk(self, data: bytes, token_ids: Sequence[int], *, last: bool = False) -> bytes:
        if self._is_noted:
            self._unnoted += token_ids
        if not data:
            # An empty chunk would end the answer.
            return b""
        if not self._is_noted:
            return chunk_of(data, token_ids) if self._is_chunked else data
        notes, self._unnoted = note(self._unnoted, last=last), []
        return b"%x%b\r\n%b\r\n" % (len(data), notes, data)

    async def run(self, drain: Callable[[], Awaitable[None]]) -> tuple[bytes, Sequence[tuple[int, Tokens]]]:
        """Until every choice has ended. Returns the last frames, which are not written yet, and what they come from.

        Raises what went wrong.
        """
        loop = asyncio.get_running_loop()
        self._generation.listen(self._on_arrival, self._plain.write if self._plain is not None else None)
        try:
            self._go()
            while not self._is_over:
                if self._is_stopped:
                    await drain()
                    self._go()
                else:
                    self._needs_care = loop.create_future()
                    await self._needs_care
        finally:
            self._stop()
            self._generation.listen(None)
        if self._error is not None:
            raise self._error
        return self._rest

    def _on_arrival(self) -> None:
        if self._is_stopped:
            return
        if self._protocol.writing_paused:
            # The client has not read what it got: it gets nothing new until it has caught up.
            self._stop()
            return
        try:
            arrived = self._generation.take()
            data = self._writer.feed(arrived)
        except Exception as error:
            self._error = error
            self._is_over = True
            self._stop()
            return
        if not self._generation.running:
            self._rest = data, arrived
            self._is_over = True
            self._stop()
            return
        if not arrived and self._pulse.is_due():
            data = KEEP_ALIVE
        if chunk := self._chunk(data, ids_of(arrived)):
            self._turn.write(self._transport, chunk)
            self._pulse.last = self._clock()

    def _go(self) -> None:
        """Write what has arrived, and what comes as it comes."""
        self._is_stopped = False
        if self._plain is not None:
            is_simple = self._is_chunked and not self._is_noted
            self._plain.lead_to(self._transport, self._turn, chunk_of if is_simple else self._chunk)
        self._on_arrival()

    def _stop(self) -> None:
        """Leave the rest to the coroutine."""
        self._is_stopped = True
        if self._plain is not None:
            self._plain.lead_nowhere()
        if self._needs_care is not None and not self._needs_care.done():
            self._needs_care.set_result(None)
