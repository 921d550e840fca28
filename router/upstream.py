"""Requests to nodes: kept-alive connections, one request at a time on each, and every wait with a deadline.

An `Exchange` is one request and its response. It is started without waiting, tells its owner through `on_change`
whenever something happened, and holds what happened as plain attributes: `head`, body pieces to `take`, `complete`,
`error`.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from router.http1 import ProtocolError, ResponseHead, ResponseParser

log = logging.getLogger(__name__)

HIGH_WATER_BYTES = 256 * 1024
"""An exchange whose owner does not take this much stops reading from the node."""
IDLE_CONNECTION_S = 15.0
"""Kept-alive connections unused for longer are closed; shorter than any usual server's own limit."""
TICK_S = 0.1
"""How often deadlines are looked at."""


class UpstreamError(Exception):
    """A node did not give a complete answer."""


class ConnectFailed(UpstreamError):
    """No connection: the node never saw the request."""


class ConnectionBroken(UpstreamError):
    """The connection ended, or what came over it was not HTTP."""


class UpstreamTimeout(UpstreamError):
    """A deadline passed."""


class NodeLost(UpstreamError):
    """The node left the cluster or fell silent."""


def _ignore() -> None:
    """Nobody listens yet, or any more."""


class Exchange:
    """One request to one node, and its response as far as it is here."""

    __slots__ = (
        "_connection",
        "_origin",
        "_pieces",
        "_relay",
        "_size",
        "complete",
        "deadline",
        "deadline_text",
        "error",
        "head",
        "heard_at",
        "max_gap_s",
        "notes",
        "on_change",
    )

    def __init__(self, origin: "Origin", on_change: Callable[[], None]) -> None:
        self._origin = origin
        self._connection: _Connection | None = None
        self._pieces: list[bytes] = []
        self._relay: Callable[[bytes], bool] | None = None
        self._size = 0
        self.on_change = on_change
        self.head: ResponseHead | None = None
        self.notes = bytearray()
        """Extensions of the chunks that came (`ResponseParser.notes`)."""
        self.complete = False
        """The whole response has arrived (its last pieces may still wait to be taken)."""
        self.error: UpstreamError | None = None
        self.heard_at = 0.0
        """When bytes last came (loop time)."""
        self.deadline = float("inf")
        """When to give up (loop time). The owner moves it; bytes alone do not."""
        self.max_gap_s = float("inf")
        """Give up when nothing came for this long."""
        self.deadline_text = ""

    @property
    def open(self) -> bool:
        """Neither complete nor failed."""
        return not self.complete and self.error is None

    def expire_at(self, deadline: float, text: str) -> None:
        """Fail with UpstreamTimeout(text) at `deadline` unless it is moved again or the response is complete."""
        self.deadline, self.deadline_text = deadline, text

    def take(self) -> bytes:
        """Everything of the body that came since the last call."""
        pieces = self._pieces
        if not pieces:
            return b""
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        if self._size > HIGH_WATER_BYTES and self._connection is not None:
            self._connection.resume()
        self._size = 0
        return data

    def relay_to(self, relay: Callable[[bytes], bool]) -> None:
        """Offer body bytes to `relay` as they come instead of waking the owner. False: they wait to be taken."""
        self._relay = relay

    def close(self) -> None:
        """Forget it. An unfinished request is cancelled by closing its connection, which is how nodes learn of it."""
        self.on_change = _ignore
        self._relay = None
        if self.open:
            self._fail(ConnectionBroken("closed here"))

    def node_lost(self, reason: str) -> None:
        if self.open:
            self._fail(NodeLost(f"{self._origin.name} is gone: {reason}"))

    def _fail(self, error: UpstreamError) -> None:
        self.error = error
        self._origin.forget(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()
        self.on_change()

    def _arrived(self, head: ResponseHead | None, pieces: list[bytes], complete: bool) -> None:
        self.head = head
        if pieces:
            relay = self._relay if not self._pieces else None
            if relay is not None and relay(pieces[0] if len(pieces) == 1 else b"".join(pieces)):
                if not complete:
                    return
                pieces = []
            self._pieces.extend(pieces)
            for piece in pieces:
                self._size += len(piece)
            if self._size > HIGH_WATER_BYTES and not complete and self._connection is not None:
                self._connection.pause()
        if complete:
            self.complete = True
            self._connection = None
            self._origin.forget(self)
        self.on_change()


class _Connection(asyncio.Protocol):
    """One TCP connection to a node. Belongs to its origin; works for at most one exchange at a time."""

    def __init__(self, origin: "Origin") -> None:
        self._origin = origin
        self._now = origin.now
        self._parser = ResponseParser()
        self._exchange: Exchange | None = None
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def start(self, exchange: Exchange, parts: Iterable[bytes | memoryview]) -> None:
        assert self._transport is not None
        self._exchange = exchange
        exchange._connection = self
        self._parser.begin()
        exchange.notes = self._parser.notes
        self._transport.writelines(parts)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            # Bytes nobody asked for: an error message before closing, or a server gone mad.
            self.abandon()
            return
        parser = self._parser
        exchange.heard_at = self._now()
        relay = exchange._relay
        if relay is not None and (piece := parser.whole_chunk(data)) is not None:
            # Nearly every event of a stream.
            if exchange._pieces or not relay(piece):
                exchange._arrived(parser.head, [piece], False)
            return
        try:
            pieces = parser.feed(data)
        except ProtocolError as error:
            exchange._fail(ConnectionBroken(f"{self._origin.name} sent no HTTP: {error}"))
            return
        if parser.done:
            self._exchange = None
            if self._paused:
                self.resume()
            assert parser.head is not None
            if parser.head.keep_alive and not parser.leftover and self._sent():
                self._origin.give_back(self)
            else:
                self.abandon()
            exchange._arrived(parser.head, pieces, True)
        elif parser.head is not None:
            exchange._arrived(parser.head, pieces, False)

    def _sent(self) -> bool:
        """Whether the request is out; a server may answer before it has read all of it."""
        return self._transport is not None and self._transport.get_write_buffer_size() == 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._origin.lost(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None or not exchange.open:
            return
        exchange._connection = None
        if exc is None and self._parser.end_of_input():
            exchange._arrived(self._parser.head, [], True)
            return
        what = f": {exc}" if exc else ""
        stage = "before its answer" if exchange.head is None else "in the middle of its answer"
        exchange._fail(ConnectionBroken(f"{self._origin.name} closed the connection {stage}{what}"))

    def abandon(self) -> None:
        """Close without ceremony."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self._paused:
            self._paused = False
            self._transport.resume_reading()


class Origin:
    """All connections to one node's HTTP address."""

    def __init__(self, url: str, *, connect_s: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, url
        tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if tls else 80)
        self.name = parts.netloc
        self.host_header = parts.netloc.encode()
        self._tls = ssl.create_default_context() if tls else None
        self._connect_s = connect_s
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self._idle: list[_Connection] = []
        self._connections: set[_Connection] = set()
        self._dialling: set[asyncio.Task[None]] = set()
        self._exchanges: set[Exchange] = set()

    def start(self, head: bytes, body: Iterable[bytes | memoryview], on_change: Callable[[], None]) -> Exchange:
        """Send a request: `head` up to and including the empty line, then the body. Never waits, never raises."""
        exchange = Exchange(self, on_change)
        exchange.heard_at = self.now()
        self._exchanges.add(exchange)
        parts = [head, *body]
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.start(exchange, parts)
                return exchange
        task = self._loop.create_task(self._dial(exchange, parts))
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)
        return exchange

    async def _dial(self, exchange: Exchange, parts: list[bytes | memoryview]) -> None:
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self), self.host, self.port, ssl=self._tls
                )
        except TimeoutError:
            if exchange.open:
                exchange._fail(ConnectFailed(f"{self.name}: no connection within {self._connect_s:g} s"))
            return
        except OSError as error:
            if exchange.open:
                exchange._fail(ConnectFailed(f"{self.name}: {error.strerror or error}"))
            return
        self._connections.add(connection)
        if exchange.open:
            connection.start(exchange, parts)
        else:
            self.give_back(connection)

    def give_back(self, connection: _Connection) -> None:
        connection.idle_since = self.now()
        self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def forget(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)

    def tick(self, now: float) -> None:
        """Fail what is overdue and close what is long unused."""
        for exchange in [e for e in self._exchanges if e.deadline <= now or now - e.heard_at > e.max_gap_s]:
            exchange._fail(UpstreamTimeout(f"{self.name}: {exchange.deadline_text}"))
        while self._idle and now - self._idle[0].idle_since > IDLE_CONNECTION_S:
            self._idle.pop(0).abandon()

    @property
    def unused(self) -> bool:
        """Nothing runs and no connection is left."""
        return not (self._exchanges or self._connections or self._dialling)

    async def close(self) -> None:
        """Close every connection; what is under way fails."""
        for exchange in list(self._exchanges):
            exchange._fail(ConnectionBroken("the router stops"))
        for task in list(self._dialling):
            task.cancel()
        await asyncio.gather(*self._dialling, return_exceptions=True)
        for connection in list(self._connections):
            connection.abandon()


class Upstream:
    """Every node's connections, by URL, and the clock that ends overdue exchanges."""

    def __init__(self, *, connect_s: float) -> None:
        self._connect_s = connect_s
        self._origins: dict[str, Origin] = {}

    def origin(self, url: str) -> Origin:
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = Origin(url, connect_s=self._connect_s)
        return origin

    async def run(self) -> None:
        """Look at deadlines until cancelled, then close everything."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await asyncio.sleep(TICK_S)
                now = loop.time()
                for url, origin in list(self._origins.items()):
                    origin.tick(now)
                    if origin.unused:
                        del self._origins[url]
        finally:
            for origin in self._origins.values():
                await origin.close()

    def check_integrity(self) -> None:
        """Raises AssertionError if a connection is both idle and at work, or an ended exchange is still tracked."""
        for origin in self._origins.values():
            assert len(set(origin._idle)) == len(origin._idle), f"{origin.name}: a connection is idle twice"
            for connection in origin._idle:
                assert connection._exchange is None, f"{origin.name}: an idle connection has an exchange"
            assert all(exchange.open for exchange in origin._exchanges), f"{origin.name}: an ended exchange is tracked"
