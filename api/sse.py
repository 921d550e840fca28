"""Server-sent events: one write per wake-up, keep-alive comments, errors as an event, the client's departure as a
cancellation (aiohttp cancels the handler, and leaving the generation's scope aborts it)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from api.context import REQUEST_ID
from api.errors import Problem
from api.generation import Generation
from api.resume import ASK_HEADER, ids_of, note
from runtime.errors import RequestError, TandemError
from runtime.requests import Tokens

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
PATH_HEADER = "X-Tandem-Path"


class EventWriter(Protocol):
    """Turns tokens into the events of one API. Every method answers complete SSE frames, or nothing."""

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


async def send_events(
    request: web.Request,
    generation: Generation,
    writer: EventWriter,
    *,
    keepalive_s: float,
    headers: Mapping[str, str],
    resumed: bool = False,
) -> web.StreamResponse:
    """Stream one generation. An error before anything was sent is raised, so that it gets its own HTTP status.

    `resumed`: the writer is in the middle of a stream that began on another node.
    """
    pulse = _Pulse(generation, keepalive_s)
    response: web.StreamResponse | None = None
    is_noted = ASK_HEADER in request.headers
    try:
        arrived: Sequence[tuple[int, Tokens]] = ()
        while not arrived and not pulse.is_due():
            arrived = await generation.wait()
        data = writer.feed(arrived) if arrived else KEEP_ALIVE
        if arrived and generation.num_choices == 1:
            headers = {**headers, **path_header(generation)}
        response, body = await _open(request, headers)
        if not resumed:
            data = writer.start() + data
        pump = _Pump(request, generation, writer, pulse, is_noted=is_noted)
        if generation.running:
            pump.send(data, arrived)
            pulse.sent()
            await body.drain()
            data, arrived = await pump.run(body.drain)
        if is_noted:
            pump.send(data + writer.end(), arrived, last=True)
            data = b""
        else:
            data += writer.end()
        await response.write_eof(data)
    except ConnectionResetError:
        # The client went away while we wrote; the caller's scope aborts the generation.
        if response is None:
            raise
    except Exception as error:
        if response is None:
            raise
        _log_failure(request, error)
        generation.close()
        if is_noted and not isinstance(error, RequestError):
            # Whoever asked for notes can have the rest from another node, if this one does not call it complete.
            if request.transport is not None:
                request.transport.abort()
            return response
        with suppress(ConnectionResetError):
            await response.write_eof(writer.error(Problem(error)))
    finally:
        pulse.stop()
    return response


def path_header(generation: Generation) -> dict[str, str]:
    """How the prompt's state came, for routers and people."""
    return {PATH_HEADER: generation.path} if generation.path else {}


async def _open(request: web.Request, headers: Mapping[str, str]) -> tuple[web.StreamResponse, AbstractStreamWriter]:
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            **headers,
        }
    )
    if request.version >= HttpVersion11:
        response.enable_chunked_encoding()
    body = await response.prepare(request)
    assert body is not None
    return response, body


def _log_failure(request: web.Request, error: Exception) -> None:
    if isinstance(error, TandemError):
        log.warning("request %s failed while streaming: %s", request.get(REQUEST_ID), error)
    else:
        log.exception("request %s failed while streaming", request.get(REQUEST_ID))


class _Pump:
    """From the engine's queue to the socket in one plain call per wake-up, while the handler's coroutine sleeps.

    With hundreds of streams in turn, resuming a handler for each token costs more than everything done with it. So the
    frames go straight to the transport, each as one HTTP chunk, once aiohttp has sent the headers. The coroutine is
    woken at the end, for an error, and when the client reads so slowly that the transport's buffer is full.
    """

    __slots__ = (
        "_error", "_generation", "_is_chunked", "_is_congested", "_is_noted", "_is_over", "_needs_care", "_protocol",
        "_pulse", "_rest", "_transport", "_turn", "_unnoted", "_writer",
    )  # fmt: skip

    def __init__(
        self,
        request: web.Request,
        generation: Generation,
        writer: EventWriter,
        pulse: "_Pulse",
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
        self._is_congested = False
        self._is_over = False
        self._error: Exception | None = None
        self._rest: tuple[bytes, Sequence[tuple[int, Tokens]]] = b"", ()

    def send(self, data: bytes, arrived: Sequence[tuple[int, Tokens]], *, last: bool = False) -> None:
        """Write frames as one chunk, with a note of the tokens they come from where that was asked for."""
        if chunk := self._chunk(data, arrived, last=last):
            self._transport.write(chunk)

    def _chunk(self, data: bytes, arrived: Sequence[tuple[int, Tokens]], *, last: bool = False) -> bytes:
        if self._is_noted:
            self._unnoted += ids_of(arrived)
        if not data:
            # An empty chunk would end the answer.
            return b""
        if not self._is_noted:
            return b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data
        notes, self._unnoted = note(self._unnoted, last=last), []
        return b"%x%b\r\n%b\r\n" % (len(data), notes, data)

    async def run(self, drain: Callable[[], Awaitable[None]]) -> tuple[bytes, Sequence[tuple[int, Tokens]]]:
        """Until every choice has ended. Returns the last frames, which are not written yet, and what they come from.

        Raises what went wrong.
        """
        loop = asyncio.get_running_loop()
        self._generation.listen(self._on_arrival)
        try:
            self._on_arrival()
            while not self._is_over:
                if self._is_congested:
                    await drain()
                    self._is_congested = False
                    self._on_arrival()
                    continue
                self._needs_care = loop.create_future()
                await self._needs_care
        finally:
            self._generation.listen(None)
        if self._error is not None:
            raise self._error
        return self._rest

    def _on_arrival(self) -> None:
        if self._is_congested or self._is_over:
            return
        if self._protocol.writing_paused:
            # The client has not read what it got: it gets nothing new until it has caught up.
            self._is_congested = True
            self._wake()
            return
        try:
            arrived = self._generation.take()
            data = self._writer.feed(arrived)
        except Exception as error:
            self._error = error
            self._is_over = True
            self._wake()
            return
        if not self._generation.running:
            self._rest = data, arrived
            self._is_over = True
            self._wake()
            return
        if not arrived and self._pulse.is_due():
            data = KEEP_ALIVE
        if chunk := self._chunk(data, arrived):
            self._turn.write(self._transport, chunk)
            self._pulse.sent()

    def _wake(self) -> None:
        if self._needs_care is not None and not self._needs_care.done():
            self._needs_care.set_result(None)


class _Pulse:
    """Wakes a silent stream every `period_s`. One timer per stream, moved only when it fires."""

    __slots__ = ("_generation", "_last", "_loop", "_period_s", "_time", "_timer")

    def __init__(self, generation: Generation, period_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._generation = generation
        self._period_s = period_s
        self._time = self._loop.time
        self._last = self._time()
        self._timer = self._loop.call_later(period_s, self._fire)

    def sent(self) -> None:
        self._last = self._time()

    def is_due(self) -> bool:
        return self._loop.time() - self._last >= self._period_s

    def _fire(self) -> None:
        silent_s = self._loop.time() - self._last
        if silent_s >= self._period_s:
            self._generation.wake()
            silent_s = 0.0
        self._timer = self._loop.call_later(self._period_s - silent_s, self._fire)

    def stop(self) -> None:
        self._timer.cancel()
