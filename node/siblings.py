"""Several API processes behind one port, seen from one of them.

The kernel gives each connection to any of the processes. Most requests are answered where they land. What one process
alone can answer is forwarded to it, over a Unix socket, the answer streamed back: a stored response to the process that
keeps it (its id tells which), the node's affairs to process 0. What is asked of the node as a whole is put together in
process 0 from the parts of all: `/metrics`, `/load`, `/abort_requests`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
from aiohttp import web

from api import admin, probes
from api.context import CONTEXT
from api.errors import Problem, dialect_of
from api.jsonio import json_response
from api.response_ids import process_of, response_of_item
from node.metrics_sum import sum_expositions
from runtime.errors import Overloaded

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PART_S = 5.0
"""For a sibling to answer with its part of something, or to accept a connection."""
_HOP_BY_HOP = frozenset(("connection", "content-length", "keep-alive", "transfer-encoding", "upgrade"))
_SETTLED = _HOP_BY_HOP | {"content-encoding", "expect", "host"}
"""Of a request: also what has been dealt with when its body was read."""


def _sum_loads(parts: Sequence[bytes]) -> bytes:
    return orjson.dumps({"server_load": sum(orjson.loads(part)["server_load"] for part in parts)})


def _join_aborted(parts: Sequence[bytes]) -> bytes:
    return orjson.dumps({"aborted": [name for part in parts for name in orjson.loads(part)["aborted"]]})


COMBINED: dict[str, Callable[[Sequence[bytes]], bytes]] = {
    "/metrics": sum_expositions,
    "/load": _sum_loads,
    "/abort_requests": _join_aborted,
}


class _FollowUp(msgspec.Struct, frozen=True):
    previous_response_id: Any = None
    previous_items: msgspec.Raw = msgspec.Raw()
    """Given by a router that asked for the conversation: then any process can answer."""
    input: Any = None
    referenced_items: msgspec.Raw = msgspec.Raw()
    """Likewise, the items that `item_reference` items mean."""

    def earlier(self) -> Any:
        """The id of a kept response that must be looked at."""
        if self.previous_response_id is not None:
            return None if bytes(self.previous_items) else self.previous_response_id
        if bytes(self.referenced_items) or not isinstance(self.input, list):
            return None
        quoted = [
            item.get("id") for item in self.input if isinstance(item, dict) and item.get("type") == "item_reference"
        ]
        return next((response_of_item(item_id) for item_id in quoted if isinstance(item_id, str)), None)


_decode_follow_up = msgspec.json.Decoder(_FollowUp).decode


class Siblings:
    """The way from process `index` to the others, and theirs to it."""

    def __init__(self, app: web.Application, directory: Path, index: int, num_processes: int) -> None:
        """Puts itself in front of `app`'s handlers."""
        self._index = index
        self._num_processes = num_processes
        self._directory = directory
        self._max_body_bytes = app[CONTEXT].settings.max_body_bytes
        self._parts = web.AppRunner(_parts_app(app), access_log=None, shutdown_timeout=1.0)
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        app.middlewares.insert(0, self._answer)

    async def open(self, runner: web.AppRunner) -> None:
        """Listen for the siblings. `runner` is that of the application itself, set up already."""
        await web.UnixSite(runner, self._socket(self._index, "api")).start()
        await self._parts.setup()
        await web.UnixSite(self._parts, self._socket(self._index, "part")).start()

    async def close(self) -> None:
        await self._parts.cleanup()
        for session in self._sessions.values():
            await session.close()

    def _socket(self, process: int, kind: str) -> str:
        return str(self._directory / f"{kind}{process}.sock")

    def _session(self, process: int, kind: str) -> aiohttp.ClientSession:
        path = self._socket(process, kind)
        if path not in self._sessions:
            self._sessions[path] = aiohttp.ClientSession(
                "http://sibling",
                connector=aiohttp.UnixConnector(path, limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_PART_S),
                auto_decompress=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
            )
        return self._sessions[path]

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        owner = await self._owner(request)
        if owner is not None and owner != self._index:
            return await self._forward(request, owner)
        answer = await handler(request)
        combine = COMBINED.get(request.path)
        if combine is None or answer.status != 200 or not isinstance(answer, web.Response):
            return answer
        assert isinstance(answer.body, bytes)
        try:
            answer.body = combine([answer.body, *await self._other_parts(request)])
        except (aiohttp.ClientError, TimeoutError) as error:
            return _unavailable(request, f"an API process of this node does not answer: {error!r}")
        return answer

    async def _owner(self, request: web.Request) -> int | None:
        """The process that alone can answer; None if any can."""
        if request.path in COMBINED or request.path.startswith("/cluster/"):
            return 0
        if not request.path.startswith("/v1/responses"):
            return None
        response_id = request.match_info.get("response_id") or await self._earlier_response(request)
        process = process_of(response_id) if isinstance(response_id, str) else None
        return process if process is not None and process < self._num_processes else None

    async def _earlier_response(self, request: web.Request) -> Any:
        if request.method != "POST" or (request.content_length or 0) > self._max_body_bytes:
            return None
        body = await request.read()
        if b'"previous_response_id"' not in body and b'"item_reference"' not in body:
            return None
        try:
            return _decode_follow_up(body).earlier()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    async def _forward(self, request: web.Request, owner: int) -> web.StreamResponse:
        """Let `owner` answer. A client that goes away cancels this, which closes the connection to `owner`."""
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _SETTLED]
        call = self._session(owner, "api").request(
            request.method, request.rel_url, data=await request.read() or None, headers=headers, allow_redirects=False
        )
        try:
            upstream = await call
        except (aiohttp.ClientError, TimeoutError) as error:
            return _unavailable(request, f"API process {owner} of this node does not answer: {error!r}")
        async with upstream:
            answer = web.StreamResponse(status=upstream.status)
            for name, value in upstream.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    answer.headers.add(name, value)
            await answer.prepare(request)
            async for data in upstream.content.iter_any():
                await answer.write(data)
            await answer.write_eof()
        return answer

    async def _other_parts(self, request: web.Request) -> list[bytes]:
        body = await request.read() or None

        async def part(process: int) -> bytes:
            session = self._session(process, "part")
            async with asyncio.timeout(_PART_S), session.request(request.method, request.path, data=body) as answer:
                answer.raise_for_status()
                return await answer.read()

        others = [process for process in range(self._num_processes) if process != self._index]
        return list(await asyncio.gather(*map(part, others)))


def _parts_app(app: web.Application) -> web.Application:
    """What siblings ask of `app` that its own clients do not see: no keys, no counting."""
    parts = web.Application()
    parts[CONTEXT] = app[CONTEXT]
    parts[probes.REGISTRY] = app[probes.REGISTRY]
    parts.router.add_get("/metrics", probes.metrics)
    parts.router.add_get("/load", probes.load)
    parts.router.add_post("/abort_requests", admin.abort_requests)
    return parts


def _unavailable(request: web.Request, message: str) -> web.Response:
    problem = Problem(Overloaded(message))
    return json_response(problem.body(dialect_of(request.path)), status=problem.status, headers=problem.headers)
