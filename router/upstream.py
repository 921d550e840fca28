"""Requests to nodes: kept-alive connections, one request at a time on each, and every wait with a deadline.

An `Exchange` is started without waiting and tells its owner through `on_change` whenever something happened.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from router.exchange import ConnectFailed, ConnectionBroken, Exchange, UpstreamTimeout
from router.node_connection import NodeConnection

log = logging.getLogger(__name__)

IDLE_CONNECTION_S = 15.0
"""Kept-alive connections unused for longer are closed; shorter than any usual server's own limit."""
TICK_S = 0.1
"""How often deadlines are looked at."""


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
        self._idle: list[NodeConnection] = []
        self._connections: set[NodeConnection] = set()
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
                    lambda: NodeConnection(self), self.host, self.port, ssl=self._tls
                )
        except TimeoutError:
            if exchange.open:
                exchange.fail(ConnectFailed(f"{self.name}: no connection within {self._connect_s:g} s"))
            return
        except OSError as error:
            if exchange.open:
                exchange.fail(ConnectFailed(f"{self.name}: {error.strerror or error}"))
            return
        self._connections.add(connection)
        if exchange.open:
            connection.start(exchange, parts)
        else:
            self.give_back(connection)

    def give_back(self, connection: NodeConnection) -> None:
        connection.idle_since = self.now()
        self._idle.append(connection)

    def lost(self, connection: NodeConnection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def forget(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)

    def tick(self, now: float) -> None:
        """Fail what is overdue and close what is long unused."""
        for exchange in self._exchanges:
            exchange.heard(now)
        for exchange in [e for e in self._exchanges if e.deadline <= now or now - e.heard_at > e.max_gap_s]:
            exchange.fail(UpstreamTimeout(f"{self.name}: {exchange.deadline_text}"))
        while self._idle and now - self._idle[0].idle_since > IDLE_CONNECTION_S:
            self._idle.pop(0).abandon()

    @property
    def unused(self) -> bool:
        """Nothing runs and no connection is left."""
        return not (self._exchanges or self._connections or self._dialling)

    async def close(self) -> None:
        """Close every connection; what is under way fails."""
        for exchange in list(self._exchanges):
            exchange.fail(ConnectionBroken("the router stops"))
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
                assert connection.idle, f"{origin.name}: an idle connection has an exchange"
            assert all(exchange.open for exchange in origin._exchanges), f"{origin.name}: an ended exchange is tracked"
