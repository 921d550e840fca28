"""Server-sent events: one write per wake-up, keep-alive comments, errors as an event, the client's departure as a
cancellation (aiohttp cancels the handler, and leaving the generation's scope aborts it)."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from aiohttp import web

from api.context import REQUEST_ID
from api.errors import Problem
from api.generation import Generation
from runtime.errors import TandemError
from runtime.requests import Tokens

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


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
) -> web.StreamResponse:
    """Stream one generation. An error before anything was sent is raised, so that it gets its own HTTP status."""
    pulse = _Pulse(generation, keepalive_s)
    response: web.StreamResponse | None = None
    try:
        data = b""
        while generation.running:
            if response is not None and data:
                await response.write(data)
                pulse.sent()
            arrived = await generation.wait()
            data = writer.feed(arrived)
            if not arrived and pulse.is_due():
                data = KEEP_ALIVE
            if response is None and (arrived or data):
                response = await _open(request, headers)
                data = writer.start() + data
        if response is None:
            response = await _open(request, headers)
        await response.write_eof(data + writer.end())
    except ConnectionResetError:
        # The client went away while we wrote; the caller's scope aborts the generation.
        if response is None:
            raise
    except Exception as error:
        if response is None:
            raise
        _log_failure(request, error)
        generation.close()
        with suppress(ConnectionResetError):
            await response.write_eof(writer.error(Problem(error)))
    finally:
        pulse.stop()
    return response


def _log_failure(request: web.Request, error: Exception) -> None:
    if isinstance(error, TandemError):
        log.warning("request %s failed while streaming: %s", request.get(REQUEST_ID), error)
    else:
        log.exception("request %s failed while streaming", request.get(REQUEST_ID))


async def _open(request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            **headers,
        }
    )
    await response.prepare(request)
    return response


class _Pulse:
    """Wakes a silent stream every `period_s`. One timer per stream, moved only when it fires."""

    def __init__(self, generation: Generation, period_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._generation = generation
        self._period_s = period_s
        self._last = self._loop.time()
        self._timer = self._loop.call_later(period_s, self._fire)

    def sent(self) -> None:
        self._last = self._loop.time()

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
