"""The last step of every generating endpoint: submit, read, and answer whole or as events."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from aiohttp import web

from api.context import CONTEXT
from api.generation import Generation
from api.jsonio import json_response
from api.pump import EventWriter
from api.reader import Output, Reader
from api.resume import CREATED_HEADER
from api.sse import path_header, send_events
from api.submission import Submission
from runtime.requests import Submit, TokenLogprobs, Tokens


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
            if submission.submits[0].generated_ids:
                _replay(submission.submits[0], reader, response)
            if stream:
                return await send_events(
                    request,
                    generation,
                    response,
                    keepalive_s=context.settings.keepalive_s,
                    headers={CREATED_HEADER: str(submission.created), **(headers or {})},
                    resumed=bool(submission.submits[0].generated_ids),
                )
            body = await response.collect()
            return json_response(body, headers={**(headers or {}), **path_header(generation)})
        finally:
            context.live.discard(generation)
            reader.close()


def _replay(submit: Submit, reader: Reader, response: Response) -> None:
    """Bring `response` to where a resumed stream broke. The client has all of that already."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    if submit.sampling.logprobs is not None:
        logprobs = tuple(TokenLogprobs(token_id, 0.0, 1, (), ()) for token_id in submit.generated_ids)
    with reader.unseen():
        response.start()
        response.feed([(0, Tokens(submit.request_id, submit.generated_ids, logprobs))])


def now() -> float:
    """The clock that requests are timed with."""
    return asyncio.get_running_loop().time()
