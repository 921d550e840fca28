"""The last step of every generating endpoint: submit, read, and answer whole or as events."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from aiohttp import web

from api.context import CONTEXT
from api.generation import Generation
from api.jsonio import json_response
from api.reader import Output, Reader
from api.sse import EventWriter, send_events
from api.submission import Submission


class Response(EventWriter, Protocol):
    """One API's way to present a generation."""

    async def collect(self) -> dict[str, Any]:
        """Read to the end and answer the JSON body."""
        ...


async def respond(
    request: web.Request,
    submission: Submission,
    outputs: Sequence[Output],
    make: Callable[[Reader], Response],
    *,
    stream: bool,
    arrived: float,
    headers: Mapping[str, str] | None = None,
) -> web.StreamResponse:
    """Generate and answer. Leaving early, by an error or because the client went away, aborts what is running."""
    context = request.app[CONTEXT]
    rank = context.rank_of(request)
    name = submission.response_id
    async with await Generation.start(
        context.engine, submission.submits, rank=rank, name=name, turn=context.turn
    ) as generation:
        reader = Reader(context, submission, generation, outputs, arrived=arrived)
        context.live.add(generation)
        try:
            response = make(reader)
            if stream:
                keepalive_s = context.settings.keepalive_s
                return await send_events(request, generation, response, keepalive_s=keepalive_s, headers=headers or {})
            return json_response(await response.collect(), headers=headers)
        finally:
            context.live.discard(generation)
            reader.close()


def now() -> float:
    """The clock that requests are timed with."""
    return asyncio.get_running_loop().time()
