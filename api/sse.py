"""Server-sent events: one write per wake-up, keep-alive comments, errors as an event, the client's departure as a
cancellation (aiohttp cancels the handler, and leaving the generation's scope aborts it)."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from api.context import REQUEST_ID
from api.errors import Problem
from api.generation import Generation
from api.pump import KEEP_ALIVE, EventWriter, Pulse, Pump
from api.resume import ASK_HEADER
from runtime.errors import RequestError, TandemError
from runtime.requests import Tokens

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PATH_HEADER = "X-Tandem-Path"


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
    pulse = Pulse(generation, keepalive_s)
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
        pump = Pump(request, generation, writer, pulse, is_noted=is_noted)
        if generation.running:
            pump.send(data, arrived)
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
