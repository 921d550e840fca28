"""Around every request: its id, its API key, errors in the shape of its API, CORS, and a count of what was answered."""

import logging
import re
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from api.auth import ApiKeys
from api.body import check_media_type
from api.context import CONTEXT, REQUEST_ID
from api.errors import Problem, dialect_of
from api.jsonio import json_response
from api.settings import ApiSettings

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")
_METHODS = frozenset(("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"))


def request_id_of(request: web.Request) -> str:
    """The caller's `x-request-id` if it is one we can use, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def around(keys: ApiKeys) -> Middleware:
    """The middleware of the node's HTTP surface."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        context = request.app[CONTEXT]
        request[REQUEST_ID] = request_id_of(request)
        context.metrics.http_in_flight += 1
        status = 499
        try:
            response = await _answer(request, handler, keys)
            status = response.status
        finally:
            context.metrics.http_in_flight -= 1
            resource = request.match_info.route.resource
            path = resource.canonical if resource is not None else "unknown"
            method = request.method if request.method in _METHODS else "other"
            context.metrics.http_requests.labels(method, path, str(status)).inc()
        return response

    return middleware


async def _answer(request: web.Request, handler: Handler, keys: ApiKeys) -> web.StreamResponse:
    try:
        if request.method == "OPTIONS" and "Origin" in request.headers:
            return web.Response(status=204)
        keys.check(request)
        if request.method == "POST" and request.can_read_body:
            check_media_type(request.headers.get("Content-Type"))
        return await handler(request)
    except Exception as error:
        problem = Problem(error)
        if problem.is_server_fault:
            log.exception("request %s failed: %s %s", request[REQUEST_ID], request.method, request.path)
        return json_response(problem.body(dialect_of(request.path)), status=problem.status, headers=problem.headers)


def on_prepare(settings: ApiSettings) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Headers of every response, streamed or not."""
    origins = settings.cors_allow_origins

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        request_id = request.get(REQUEST_ID)
        if request_id is not None:
            response.headers["X-Request-Id"] = request_id
        origin = request.headers.get("Origin")
        if origin is None or not origins:
            return
        response.headers["Vary"] = "Origin"
        if "*" in origins or origin in origins:
            response.headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
            if request.method == "OPTIONS":
                response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
                response.headers["Access-Control-Allow-Headers"] = (
                    request.headers.get("Access-Control-Request-Headers") or "Authorization, Content-Type"
                )
                response.headers["Access-Control-Max-Age"] = "600"

    return add_headers
