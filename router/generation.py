"""One request to generate, from any kind of server connection: admitted, parsed, dispatched, counted."""

import asyncio
import itertools
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from router.errors import error_answer
from router.kept_responses import RESPONSES
from router.request import Request
from router.sink import ClientGone, Sink
from runtime import logging as request_logging
from runtime.errors import TandemError

if TYPE_CHECKING:
    from router.service import RouterService

GENERATING = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/inference/v1/generate")
)
"""POST routes that make tokens: dispatched on two legs."""


_PREFIX = secrets.token_hex(10)
_numbers = itertools.count(1)


def request_id_of(given: str | None) -> str:
    """The client's own id if it is fit for a header and a log line, else a new one."""
    if given and len(given) <= 256 and given.isascii() and given.isprintable():
        return given
    return f"{_PREFIX}{next(_numbers):012x}"


async def generate(
    service: "RouterService", path: str, query: str, headers: Mapping[str, str], raw: bytes, request_id: str, sink: Sink
) -> None:
    """Answer into `sink`. `path` is one of GENERATING, `query` what follows it; `headers` has lower-case names.

    Raises ClientGone or CancelledError when the client left.
    """
    request_logging.request_id.set(request_id)
    started = service.clock()
    try:
        service.enter()
    except TandemError as error:
        await sink.answer(*error_answer(error, path))
        service.metrics.answered(path, sink.status)
        return
    try:
        max_choices = service.config.requests.max_choices
        request = Request(path + query, headers, raw, request_id, max_choices=max_choices)
        refusal = await service.kept_responses.add_what_is_kept(request) if path == RESPONSES else None
        if refusal is None:
            await service.dispatcher.serve(request, sink)
        else:
            await sink.answer(refusal.head.status, [("Content-Type", "application/json")], refusal.body)
    except TandemError as error:
        await sink.answer(*error_answer(error, path))
    except (ClientGone, asyncio.CancelledError):
        service.metrics.disconnects.inc()
        raise
    finally:
        service.leave()
    service.metrics.answered(path, sink.status)
    service.metrics.seconds.observe(service.clock() - started)
