"""The door: every client connection starts here, and requests to generate are served on it without a framework.

A connection whose request is anything else, or is written in any unusual way, is handed to aiohttp with the bytes that
came, and stays there. So this file knows one kind of request: POST to a generating route, HTTP/1.1, Content-Length.
"""

import asyncio
import http
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web

from router.generation import GENERATING, generate, request_id_of
from router.outbox import Outbox
from router.sink import ClientGone, Headers

if TYPE_CHECKING:
    from router.service import RouterService

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024
MAX_PIPELINED_BYTES = 64 * 1024
TICK_S = 1.0
STARTS_PER_TURN = 4

_PATHS = {path.encode(): path for path in GENERATING}
_START = b"POST /"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus}
_UNUSUAL = frozenset((b"transfer-encoding", b"expect", b"upgrade", b"content-encoding"))


class Front:
    """All client connections that are not aiohttp's."""

    def __init__(self, service: "RouterService", fallback: web.Server) -> None:
        self.service = service
        self.fallback = fallback
        self.loop = asyncio.get_running_loop()
        self.outbox = Outbox(self.loop)
        self.connections: set[ClientConnection] = set()
        self._starts: deque[Callable[[], None]] = deque()

    def __call__(self) -> asyncio.Protocol:
        """The protocol for a new connection."""
        if not self.service.config.server.fast_path:
            return self.fallback()
        return ClientConnection(self)

    def start_soon(self, begin: Callable[[], None]) -> None:
        """Call `begin` when it is its turn. Requests that come all at once are begun a few in each turn of the event
        loop: streams that run already get their events in between.
        """
        self._starts.append(begin)
        if len(self._starts) == 1:
            self.loop.call_soon(self._start_some)

    def _start_some(self) -> None:
        for _ in range(min(STARTS_PER_TURN, len(self._starts))):
            self._starts[0]()
            self._starts.popleft()
        if self._starts:
            self.loop.call_soon(self._start_some)

    async def run(self) -> None:
        """Close connections that are idle, or dawdle over a request, until cancelled."""
        config = self.service.config.server
        while True:
            await asyncio.sleep(TICK_S)
            now = self.loop.time()
            for connection in list(self.connections):
                limit_s = config.keepalive_s if connection.idle else config.header_timeout_s
                if not connection.busy and now - connection.heard_at > limit_s:
                    connection.abort()

    def close_idle(self) -> None:
        """The router stops: connections without a request end now, the others after it."""
        for connection in list(self.connections):
            if not connection.busy:
                connection.abort()

    async def close(self) -> None:
        """End every connection and wait for their requests to clean up."""
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


class ClientConnection(asyncio.Protocol):
    """One connection, one request at a time."""

    __slots__ = (
        "_body",
        "_buffer",
        "_descriptor",
        "_drained",
        "_front",
        "_gathered",
        "_head",
        "_missing",
        "_queued",
        "_reading",
        "_transport",
        "_waits",
        "heard_at",
        "task",
    )

    def __init__(self, front: Front) -> None:
        self._front = front
        self._transport: asyncio.Transport | None = None
        self._descriptor = -1
        self._gathered = False
        """Something for this client waits in the outbox."""
        self._queued = False
        """The transport was given something that may still wait there."""
        self._buffer = b""
        self._body: list[bytes] = []
        self._missing = 0
        self._head: _RequestHead | None = None
        self._drained: asyncio.Future[None] | None = None
        self._reading = True
        self._waits = False
        """A whole request is here and waits for its turn to be served."""
        self.task: asyncio.Task[None] | None = None
        self.heard_at = front.loop.time()

    @property
    def idle(self) -> bool:
        """Between requests."""
        return not self.busy and self._head is None and not self._buffer

    @property
    def busy(self) -> bool:
        """Serves a request, or is about to."""
        return self.task is not None or self._waits

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._descriptor = transport.get_extra_info("socket").fileno()
        self._front.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._front.connections.discard(self)
        self.resume_writing()
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._front.loop.time()
        if self.busy:
            self._buffer += data
            if len(self._buffer) > MAX_PIPELINED_BYTES and self._transport is not None:
                self._reading = False
                self._transport.pause_reading()
        elif self._head is not None:
            self._take_body(data)
        else:
            self._take_head(self._buffer + data if self._buffer else data)

    def pause_writing(self) -> None:
        if self._drained is None:
            self._drained = self._front.loop.create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    # Requests

    def _take_head(self, data: bytes) -> None:
        if not (data.startswith(_START) or _START.startswith(data)):
            self._hand_over(data)
            return
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = data
            if len(data) > MAX_HEAD_BYTES:
                self._hand_over(data)
            return
        head = _parse(data[:end])
        if head is None or head.length > self._front.service.config.server.max_payload_bytes:
            self._hand_over(data)
            return
        self._buffer = b""
        self._head = head
        self._missing = head.length
        self._take_body(data[end + 4 :])

    def _take_body(self, data: bytes) -> None:
        if len(data) > self._missing:
            data, self._buffer = data[: self._missing], data[self._missing :]
        self._missing -= len(data)
        if data:
            self._body.append(data)
        if self._missing:
            return
        head = self._head
        assert head is not None
        raw = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._head, self._body = None, []
        self._front.start_soon(lambda: self._begin(head, raw))
        self._waits = True

    def _begin(self, head: "_RequestHead", raw: bytes) -> None:
        self._waits = False
        if self._transport is not None and not self._transport.is_closing():
            self.task = self._front.loop.create_task(self._serve(head, raw))

    async def _serve(self, head: "_RequestHead", raw: bytes) -> None:
        service = self._front.service
        headers = head.headers
        request_id = request_id_of(headers.get("x-request-id"))
        close = head.close or service.stopping
        sink = RawSink(self, self._own_headers(headers, request_id, close))
        try:
            await generate(service, head.path, head.query, headers, raw, request_id, sink)
        except ClientGone:
            self.abort()
        except Exception:
            log.exception("POST %s failed", head.path)
            self.abort()
        finally:
            self.task = None
        if close or service.stopping:
            if self._transport is not None:
                self._transport.close()
        else:
            self._next()

    def _next(self) -> None:
        """Ready for another request; it may be here already."""
        self.heard_at = self._front.loop.time()
        if self._transport is None:
            return
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()
        if self._buffer:
            data, self._buffer = self._buffer, b""
            self._take_head(data)

    def _own_headers(self, headers: dict[str, str], request_id: str, close: bool) -> str:
        """What the router adds to every answer."""
        text = f"x-request-id: {request_id}\r\n"
        origin = headers.get("origin")
        if origin is not None:
            allowed = self._front.service.config.server.cors_allowed_origins
            if "*" in allowed or origin in allowed:
                text += f"access-control-allow-origin: {origin}\r\nvary: Origin\r\n"
        return f"{text}connection: close\r\n" if close else text

    def _hand_over(self, data: bytes) -> None:
        """Let aiohttp have the connection, from the first byte of this request on."""
        transport = self._transport
        assert transport is not None
        self._front.connections.discard(self)
        self._transport = None
        handler = self._front.fallback()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        handler.data_received(data)

    # For the sink

    @property
    def blocked(self) -> bool:
        """The client reads too slowly, or is gone."""
        return self._drained is not None or self._transport is None

    def send(self, *parts: bytes) -> None:
        """Raises ClientGone."""
        if self._gathered:
            self._front.outbox.flush()
        if self._transport is None or self._transport.is_closing():
            raise ClientGone
        self._queued = True
        self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def write_now(self, data: bytes) -> bool:
        """To the socket in this turn of the event loop. False: the client reads too slowly, or is gone."""
        if self._drained is not None or self._transport is None:
            return False
        self._gathered = True
        self._front.outbox.add(self, data)
        return True

    def write_out(self, data: bytes) -> None:
        """To the socket itself, if nothing waits before it. For the outbox."""
        self._gathered = False
        transport = self._transport
        # A transport that is closing may have given its descriptor back, and that may be somebody else's by now.
        if transport is None or transport.is_closing():
            return
        if self._queued:
            if transport.get_write_buffer_size():
                transport.write(data)
                return
            self._queued = False
        try:
            sent = os.write(self._descriptor, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort()
            return
        if sent < len(data):
            self._queued = True
            transport.write(data[sent:])

    async def drain(self) -> None:
        """Wait while the client reads too slowly. Raises ClientGone if it stopped reading, or left."""
        if self._drained is None:
            return
        try:
            async with asyncio.timeout(self._front.service.config.server.write_stall_s):
                await asyncio.shield(self._drained)
        except TimeoutError:
            self.abort()
        if self._transport is None:
            raise ClientGone

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _RequestHead:
    """A request this file serves itself."""

    __slots__ = ("close", "headers", "length", "path", "query")

    def __init__(self, path: str, query: str, headers: dict[str, str], length: int, *, close: bool) -> None:
        self.path = path
        self.query = query
        self.headers = headers
        self.length = length
        self.close = close


def _parse(data: bytes) -> _RequestHead | None:
    """A head without its empty line, or None for whatever is not ours to serve."""
    request_line, *lines = data.split(b"\r\n")
    method, _, rest = request_line.partition(b" ")
    target, _, version = rest.partition(b" ")
    name, question, query = target.partition(b"?")
    path = _PATHS.get(name)
    if method != b"POST" or path is None or version != b"HTTP/1.1":
        return None
    headers: dict[str, str] = {}
    length = -1
    for line in lines:
        key, colon, value = line.partition(b":")
        key = key.lower()
        if not colon or not key or key in _UNUSUAL or key.strip() != key or not key.isascii():
            return None
        value = value.strip(b" \t")
        if b"\r" in value or b"\n" in value or b"\0" in value:
            return None
        if key == b"content-length":
            if length >= 0 or not value.isdigit() or len(value) > 12:
                return None
            length = int(value)
        headers[key.decode()] = value.decode("latin-1")
    if length < 0 or "host" not in headers:
        return None
    close = "close" in headers.get("connection", "").lower()
    return _RequestHead(path, (question + query).decode("latin-1"), headers, length, close=close)


class RawSink:
    """The answer on one of these connections."""

    __slots__ = ("_connection", "_head", "_own_headers", "status", "write_chunk")

    def __init__(self, connection: ClientConnection, own_headers: str) -> None:
        self._connection = connection
        self._own_headers = own_headers
        self._head = b""
        """Not sent yet: it goes out together with the first bytes of the body."""
        self.status = 0
        self.write_chunk = connection.write_now

    @property
    def started(self) -> bool:
        return self.status != 0

    def _head_for(self, status: int, headers: Headers, framing: str) -> bytes:
        self.status = status
        line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        return f"{line}{lines}{self._own_headers}{framing}\r\n".encode("latin-1")

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        self._connection.send(self._head_for(status, headers, f"content-length: {len(body)}\r\n"), body)

    async def start(self, status: int, headers: Headers) -> None:
        self._head = self._head_for(status, headers, "transfer-encoding: chunked\r\n")

    async def write(self, data: bytes) -> None:
        connection = self._connection
        head, self._head = self._head, b""
        connection.send(b"%b%x\r\n%b\r\n" % (head, len(data), data))
        if connection.blocked:
            await connection.drain()

    def write_now(self, data: bytes) -> bool:
        return not self._head and self._connection.write_now(b"%x\r\n%b\r\n" % (len(data), data))

    async def finish(self) -> None:
        head, self._head = self._head, b""
        self._connection.send(head + b"0\r\n\r\n")

    def break_off(self) -> None:
        self._connection.abort()
