"""One TCP connection to a node: requests go out, and what comes back is told to the exchange it belongs to."""

import asyncio
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from router.exchange import ConnectionBroken, Exchange, Way
from router.http1 import ProtocolError, ResponseParser, whole_chunks

if TYPE_CHECKING:
    from router.upstream import Origin

_EVENT_AND_CHUNK_END = b"\n\n\r\n"
_SEMICOLON = ord(";")
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)
"""Linux only."""


class NodeConnection(asyncio.Protocol):
    """Belongs to its origin; works for at most one exchange at a time."""

    __slots__ = (
        "_exchange",
        "_notes",
        "_now",
        "_origin",
        "_parser",
        "_paused",
        "_transport",
        "_write_chunk",
        "idle_since",
        "took_short_way",
    )

    def __init__(self, origin: "Origin") -> None:
        self._write_chunk: Way | None = None
        """Set while the short way is open: all that came was passed on, and a chunk is to begin."""
        self._notes = bytearray()
        self.took_short_way = False
        """Something did, since somebody last looked."""
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
    def idle(self) -> bool:
        """Without an exchange."""
        return self._exchange is None

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def start(self, exchange: Exchange, parts: Iterable[bytes | memoryview]) -> None:
        assert self._transport is not None
        self._exchange = exchange
        self._parser.begin()
        self._notes = self._parser.notes
        self.took_short_way = False
        exchange.begin_on(self, self._notes)
        self._transport.writelines(parts)

    def acknowledge_lazily(self) -> None:
        """Have the kernel acknowledge every second event instead of each one as it is read: a packet less to send.

        A stream slower than that ends this by itself after one late acknowledgement (40 ms), so that even a node that
        waits for them is held up once only.
        """
        if self._transport is not None and _QUICKACK is not None:
            self._transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, _QUICKACK, 0)

    def data_received(self, data: bytes) -> None:
        write_chunk = self._write_chunk
        if write_chunk is not None and data.endswith(_EVENT_AND_CHUNK_END):
            # Nearly every event of a stream: one chunk, whole. Its framing is as good for the client as for us, so it
            # goes on as it came, all but its note. With hundreds of streams every object touched here is a cache miss.
            eol = data.find(b"\r\n")
            size = len(data) - eol - 4
            # Compared as text: int() would take signs, spaces and underscores, which no client should have to read.
            digits = b"%x" % size
            at = len(digits)
            if size > 0 and data.startswith(digits):
                if at == eol:
                    if write_chunk(data):
                        self.took_short_way = True
                        return
                elif data[at] == _SEMICOLON and at + 1 < eol and write_chunk(digits + data[eol:]):
                    self._notes += data[at:eol]
                    self.took_short_way = True
                    return
            elif (several := whole_chunks(data)) is not None:
                # We are late: the events that came meanwhile go out as one.
                body, notes = several
                if write_chunk(b"%x\r\n%b\r\n" % (len(body), body)):
                    self._notes += notes
                    self.took_short_way = True
                    return
        self._write_chunk = None
        self._take(data)

    def _take(self, data: bytes) -> None:
        """The long way: parsed, and told to the exchange."""
        exchange = self._exchange
        if exchange is None:
            # Bytes nobody asked for: an error message before closing, or a server gone mad.
            self.abandon()
            return
        parser = self._parser
        exchange.heard_at = self._now()
        try:
            pieces = parser.feed(data)
        except ProtocolError as error:
            exchange.fail(ConnectionBroken(f"{self._origin.name} sent no HTTP: {error}"))
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
            exchange.arrived(parser.head, pieces, True)
        elif parser.head is not None and exchange.arrived(parser.head, pieces, False) and parser.at_chunk:
            self._write_chunk = exchange.write_chunk

    def _sent(self) -> bool:
        """Whether the request is out; a server may answer before it has read all of it."""
        return self._transport is not None and self._transport.get_write_buffer_size() == 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._origin.lost(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None or not exchange.open:
            return
        exchange.connection_lost()
        if exc is None and self._parser.end_of_input():
            assert self._parser.head is not None
            exchange.arrived(self._parser.head, [], True)
            return
        what = f": {exc}" if exc else ""
        stage = "before its answer" if exchange.head is None else "in the middle of its answer"
        exchange.fail(ConnectionBroken(f"{self._origin.name} closed the connection {stage}{what}"))

    def abandon(self) -> None:
        """Close without ceremony."""
        self._exchange = self._write_chunk = None
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
