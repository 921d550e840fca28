"""For operators, behind `enable_admin`: abort requests, forget cached prefixes, show the settings."""

import re

import msgspec
from aiohttp import web

from api.body import decode
from api.context import CONTEXT
from api.jsonio import json_response
from runtime.errors import RequestError


class AbortBody(msgspec.Struct, frozen=True):
    """POST /abort_requests: response ids, or request ids without the prefix. None: all."""

    request_ids: list[str] | None = None


async def abort_requests(request: web.Request) -> web.Response:
    """End running requests; their callers get an error."""
    context = request.app[CONTEXT]
    body = decode(await request.read() or b"{}", AbortBody)
    error = RequestError("The request was aborted by an operator.", status=409, code="aborted")
    asked = None if body.request_ids is None else set(body.request_ids)
    aborted = []
    for generation in list(context.live):
        names = {generation.name, re.split("[-_]", generation.name, maxsplit=1)[-1]}
        if asked is None or asked & names:
            generation.abort(error)
            aborted.append(generation.name)
    return json_response({"aborted": aborted})


async def reset_prefix_cache(request: web.Request) -> web.Response:
    request.app[CONTEXT].engine.reset_prefix_cache()
    return web.Response(status=200)


async def server_info(request: web.Request) -> web.Response:
    """The engine and the settings, keys left out."""
    context = request.app[CONTEXT]
    settings = msgspec.to_builtins(context.settings)
    settings["api_keys"] = len(settings["api_keys"])
    ranks = [msgspec.to_builtins(rank) for rank in context.engine.ranks()]
    return json_response({"engine": msgspec.to_builtins(context.info), "settings": settings, "ranks": ranks})
