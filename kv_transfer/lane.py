"""What two ranks say about transfers: protobuf messages in frames, on a TCP connection beside their gRPC stream.

The stream introduces both sides, proves who they are, notices a host that vanished or a process that hangs, and says
why a conversation ended. It brings a message from one process to another in 0.5 to 0.9 ms, most of it from thread to
thread; a lane, which the event loops read and write themselves, in half of that, and Ready is what a client waits for.

The prefill rank listens. Its Hello names the port and a key that is good for one connection; the decode rank connects
and sends the key as the first frame. A lane and its stream end together, whichever of them breaks first. A frame is
four bytes of length, little endian, and a serialised ToPrefill or ToDecode.
"""

import asyncio
import random
import secrets
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.errors import ConfigError
from runtime.grpc import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, MAX_MESSAGE_BYTES, TlsConfig

_LENGTH = struct.Struct("<I")
_KEY_BYTES = 16
_TRIES = 50
"""Ports that are tried before it is said that none is free."""


class LaneError(Exception):
    """There is no lane, or what comes over it are no frames."""


class Lane(asyncio.Protocol):
    """One end. What arrives before `listen` waits."""

    def __init__(self, on_open: Callable[["Lane"], None] | None = None) -> None:
        self.over = asyncio.Event()
        """Nothing will be heard any more."""
        self.failure: Exception | None = None
        """What `on_frame` raised, or what was wrong with a frame."""
        self._on_open = on_open
        self._on_frame: Callable[[bytes], None] | None = None
        self._max_bytes = MAX_MESSAGE_BYTES
        self._transport: asyncio.Transport
        self._buffer = bytearray()

    def listen(self, on_frame: Callable[[bytes], None] | None, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        """Gives every message to `on_frame`; what that raises ends the lane, a longer one too. None lets them wait."""
        self._on_frame, self._max_bytes = on_frame, max_bytes
        self.data_received(b"")

    def send(self, message: bytes) -> None:
        """Does nothing once the lane is over."""
        if not self._transport.is_closing():
            self._transport.write(_LENGTH.pack(len(message)) + message)

    def close(self) -> None:
        """What was sent still goes out."""
        self._transport.close()

    def fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        _notice_loss(transport.get_extra_info("socket"))
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            while self._on_frame is not None and (frame := self._next_frame()) is not None:
                self._on_frame(frame)
        except Exception as error:  # for whoever looks after the conversation
            self.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()

    def _next_frame(self) -> bytes | None:
        if len(self._buffer) < _LENGTH.size or self.failure is not None:
            return None
        (num_bytes,) = _LENGTH.unpack_from(self._buffer)
        if num_bytes > self._max_bytes:
            raise LaneError(f"a message of {num_bytes} bytes, {self._max_bytes} are allowed")
        end = _LENGTH.size + num_bytes
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return frame


def _notice_loss(connection: socket.socket) -> None:
    """End the connection when the other host is silent for as long as a stream's keepalive allows."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(KEEPALIVE_S))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(KEEPALIVE_TIMEOUT_S))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * (KEEPALIVE_S + KEEPALIVE_TIMEOUT_S)))


class Lanes:
    """The prefill end's listener: brings connections to the streams that expect them."""

    def __init__(self, tls: TlsConfig | None, patience_s: float) -> None:
        self._tls = tls
        self._patience_s = patience_s
        """How long a connection may take to send a key."""
        self._expected: dict[bytes, asyncio.Future[Lane]] = {}
        self._strangers: set[Lane] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, host: str, port_range: tuple[int, int]) -> None:
        """Listen on a free port of the range, both ends included. ConfigError if there is none."""
        context = None if self._tls is None else _tls_context(self._tls, ssl.Purpose.CLIENT_AUTH)
        loop = asyncio.get_running_loop()
        for port in (random.randint(*port_range) for _ in range(_TRIES)):
            try:
                self._server = await loop.create_server(
                    lambda: Lane(self._opened),
                    host,
                    port,
                    ssl=context,
                    ssl_handshake_timeout=None if context is None else self._patience_s,
                )
            except OSError as error:
                refusal = error
                continue
            self.port = port
            return
        raise ConfigError(f"no port of {port_range[0]}-{port_range[1]} on {host} is free for lanes: {refusal}")

    @contextmanager
    def expect(self) -> Iterator[tuple[bytes, asyncio.Future[Lane]]]:
        """A new key, and the lane of whoever sends it while the context lasts."""
        key, coming = secrets.token_bytes(_KEY_BYTES), asyncio.get_running_loop().create_future()
        self._expected[key] = coming
        try:
            yield key, coming
        except BaseException:
            if coming.done() and not coming.cancelled():
                coming.result().close()
            raise
        finally:
            self._expected.pop(key, None)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for lane in self._strangers:
            lane.close()

    def _opened(self, lane: Lane) -> None:
        self._strangers.add(lane)
        asyncio.get_running_loop().call_later(self._patience_s, self._give_up, lane)
        lane.listen(lambda key: self._introduced(lane, key), _KEY_BYTES)

    def _introduced(self, lane: Lane, key: bytes) -> None:
        self._strangers.discard(lane)
        coming = self._expected.pop(key, None)
        if coming is None or coming.done():
            raise LaneError("nobody expects this key")
        lane.listen(None)
        coming.set_result(lane)

    def _give_up(self, lane: Lane) -> None:
        if lane in self._strangers:
            self._strangers.discard(lane)
            lane.fail(LaneError("no key"))


async def open_lane(host: str, port: int, key: bytes, tls: TlsConfig | None) -> Lane:
    """The decode end of a lane. OSError when there is no way to it."""
    context = None if tls is None else _tls_context(tls, ssl.Purpose.SERVER_AUTH)
    name = None if tls is None else tls.server_name or host
    _, lane = await asyncio.get_running_loop().create_connection(Lane, host, port, ssl=context, server_hostname=name)
    lane.send(key)
    return lane


def _tls_context(tls: TlsConfig, purpose: ssl.Purpose) -> ssl.SSLContext:
    """Mutual TLS as on the gRPC side: both ends present a certificate signed by `ca`."""
    tls.read()  # names the file that is missing
    context = ssl.create_default_context(purpose, cafile=tls.ca)
    context.load_cert_chain(tls.cert, tls.key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context
