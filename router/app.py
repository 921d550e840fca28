"""The router's HTTP surface on aiohttp: every route, and the way from an aiohttp request to the dispatcher."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from router.errors import error_answer
from router.generation import GENERATING, generate, request_id_of
from router.nodes import Role
from router.proxy import Proxied
from router.request import Request
from router.sink import ClientGone, Headers
from runtime.errors import TandemError

if TYPE_CHECKING:
    from router.service import RouterService

log = logging.getLogger(__name__)

PASSED_ON = (
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/render",
    "/v1/completions/render",
)
"""POST routes that any node answers by itself."""

KEPT = (
    ("GET", "/v1/responses/{id}"),
    ("DELETE", "/v1/responses/{id}"),
    ("POST", "/v1/responses/{id}/cancel"),
    ("GET", "/v1/responses/{id}/input_items"),
)
"""Routes that only the node that keeps the response can answer."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AiohttpSink:
    """The answer to one aiohttp request."""

    def __init__(self, request: web.Request, headers: Headers, stall_s: float) -> None:
        self._request = request
        self._headers = headers
        self._stall_s = stall_s
        self.response: web.StreamResponse | None = None

    @property
    def status(self) -> int:
        return 0 if self.response is None else self.response.status

    @property
    def started(self) -> bool:
        return self.response is not None

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        self.response = web.Response(status=status, body=body, headers=[*self._headers, *headers])

    async def start(self, status: int, headers: Headers) -> None:
        self.response = web.StreamResponse(status=status, headers=[*self._headers, *headers])
        await self._guard(self.response.prepare(self._request))

    async def write(self, data: bytes) -> None:
        assert self.response is not None
        await self._guard(self.response.write(data))

    async def finish(self) -> None:
        assert self.response is not None
        await self._guard(self.response.write_eof())

    def write_now(self, data: bytes) -> bool:
        return False

    def write_chunk(self, data: bytes) -> bool:
        return False

    def break_off(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _guard(self, writing: Awaitable[Any]) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await writing
        except (ConnectionError, TimeoutError):
            self.break_off()
            raise ClientGone from None


def build_app(service: "RouterService") -> web.Application:
    """The application. Nothing in it outlives a request."""
    app = web.Application(
        client_max_size=service.config.server.max_payload_bytes, middlewares=[_errors, _preflight], logger=log
    )
    app.on_response_prepare.append(_allow_origin(service))
    for path in sorted(GENERATING):
        app.router.add_post(path, _generating(service))
    for path in PASSED_ON:
        app.router.add_post(path, _passing(service))
    for path in ("/v1/models", "/v1/models/{model:.+}", "/version", "/openapi.json"):
        app.router.add_get(path, _passing(service))
    app.router.add_post("/v1/responses/input_tokens", _input_tokens(service))
    for method, path in KEPT:
        app.router.add_route(method, path, _kept(service))
    app.router.add_get("/health", _health(service))
    app.router.add_get("/readiness", _readiness(service))
    app.router.add_get("/liveness", _liveness)
    app.router.add_get("/ping", _liveness)
    app.router.add_get("/metrics", _metrics(service))
    app.router.add_get("/workers", _workers(service))
    app.router.add_get("/list_workers", _list_workers(service))
    return app


def _generating(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        request_id = request_id_of(request.headers.get("X-Request-Id"))
        sink = AiohttpSink(request, [("X-Request-Id", request_id)], service.config.server.write_stall_s)
        raw = await request.read()
        headers = _plain_headers(request)
        raw_query = request.rel_url.raw_query_string
        query = f"?{raw_query}" if raw_query else ""
        # A client that left: aiohttp notices by itself that nobody is there for what is returned.
        with contextlib.suppress(ClientGone):
            await generate(service, request.path, query, headers, raw, request_id, sink)
        assert sink.response is not None
        return sink.response

    return handle


def _plain_headers(request: web.Request) -> dict[str, str]:
    """Names in lower case; values as the bytes that came, each a character."""
    return {
        name.lower(): value.encode("utf-8", "surrogateescape").decode("latin-1")
        for name, value in request.headers.items()
    }


def _passing(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = _plain_headers(request)
        return _passed(await service.any_node.ask(request.method, request.path_qs, headers, body))

    return handle


def _kept(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        kept = service.kept_responses
        node = kept.keeper(request.match_info["id"])
        return _passed(await kept.ask(node, request.method, request.path_qs, _plain_headers(request)))

    return handle


def _input_tokens(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        headers = _plain_headers(request)
        question = Request(request.path, headers, await request.read(), "", max_choices=1)
        refusal = await service.kept_responses.add_what_is_kept(question)
        return _passed(refusal or await service.any_node.ask("POST", request.path, headers, question.raw))

    return handle


def _passed(answer: Proxied) -> web.Response:
    content_type = answer.head.get(b"content-type") or b"application/json"
    return web.Response(
        status=answer.head.status, body=answer.body, headers={"Content-Type": content_type.decode("latin-1")}
    )


def _health(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        report = service.proofs.report(service.clock())
        return _json(report, 200 if report["status"] == "healthy" else 503)

    return handle


def _readiness(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        report: dict[str, Any] = {}
        for role in Role:
            nodes = [node for node in service.registry.nodes if node.info.role is role]
            report[role.value] = {"healthy": sum(node.usable for node in nodes), "total": len(nodes)}
        able = bool(service.proofs.pairs())
        report["status"] = "ready" if able and not service.stopping else "not ready"
        if service.stopping:
            report["reason"] = "the router is stopping"
        elif not able:
            report["reason"] = "no pair of nodes could serve a request"
        return _json(report, 200 if report["status"] == "ready" else 503)

    return handle


async def _liveness(request: web.Request) -> web.StreamResponse:
    return web.Response(text="OK")


def _metrics(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        body = generate_latest(service.prometheus)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return handle


def _workers(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        now = service.clock()
        workers = []
        for node in service.registry.nodes:
            info = node.info
            workers.append(
                {
                    "id": info.node_id,
                    "url": info.url,
                    "model_id": info.model_id,
                    "worker_type": info.role.value,
                    "is_healthy": node.usable and node.suspect_until <= now,
                    "state": node.state,
                    "trouble": node.trouble,
                    "load": sum(target.in_flight for target in node.targets),
                    "dialect": info.dialect,
                    "format": info.format_summary,
                    "local_prefill": info.local_prefill,
                    "heard_s_ago": round(now - node.heard_at, 3),
                    "ranks": [
                        {
                            "rank": target.info.rank,
                            "epoch": target.info.epoch,
                            "handoff_address": target.info.handoff_address,
                            "in_flight": target.in_flight,
                            "load": {name: getattr(target.load, name) for name in target.load.__slots__},
                        }
                        for target in node.targets
                    ],
                }
            )
        totals = {f"{role.value}_workers": sum(w["worker_type"] == role.value for w in workers) for role in Role}
        return _json({"workers": workers, "total": len(workers), **totals})

    return handle


def _list_workers(service: "RouterService") -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return _json({"urls": [node.info.url for node in service.registry.nodes]})

    return handle


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in the shape that clients of the path read."""
    try:
        return await handler(request)
    except (TandemError, web.HTTPException) as error:
        if isinstance(error, web.HTTPException) and error.status < 400:
            raise
        shown: Exception = error
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        shown = error
    status, headers, body = error_answer(shown, request.path)
    return web.Response(status=status, headers=headers, body=body)


@web.middleware
async def _preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers a browser's question before its request; `_allow_origin` marks this answer like all others."""
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return await handler(request)
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
            "Access-Control-Max-Age": "600",
        },
    )


def _allow_origin(service: "RouterService") -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    allowed = service.config.server.cors_allowed_origins

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin")
        if origin is not None and ("*" in allowed or origin in allowed):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"

    return mark
