"""The socket between an API process and one of its engine processes: typed messages, batched, in order, one way each.

Two PUSH/PULL pairs on Unix sockets in a directory that only this user can enter. Both queues are unbounded on purpose:
what may be outstanding is bounded where requests are admitted, and a full socket must never block the step loop.
Bytes are made here and nowhere else.
"""

import asyncio
import math
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from runtime.errors import ProcessDied
from runtime.requests import FromEngine, ToEngine

_encode = msgspec.msgpack.Encoder().encode
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
_decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


class ChannelAddress(msgspec.Struct, frozen=True):
    """Where one engine process and its API process meet. `directory` is created by the API process, mode 0700."""

    directory: str
    rank: int

    @property
    def to_engine(self) -> str:
        return f"ipc://{Path(self.directory) / f'rank{self.rank}.in'}"

    @property
    def from_engine(self) -> str:
        return f"ipc://{Path(self.directory) / f'rank{self.rank}.out'}"


def _socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket


class EngineChannel:
    """The engine's end. Belongs to the step thread; only `wake` may be called from elsewhere."""

    def __init__(self, address: ChannelAddress) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox = _socket(self._context, zmq.PULL)
        self._inbox.bind(address.to_engine)
        self._outbox = _socket(self._context, zmq.PUSH)
        self._outbox.connect(address.from_engine)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._closed = False
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        parent = multiprocessing.parent_process()
        self._parent_fd = parent.sentinel if parent is not None else None
        if self._parent_fd is not None:
            self._poller.register(self._parent_fd, zmq.POLLIN)

    def watch(self, descriptor: int) -> None:
        """Let `receive` also end when this file descriptor is readable. It must stay open until `close`."""
        self._poller.register(descriptor, zmq.POLLIN)

    def send(self, message: FromEngine) -> None:
        """Queue a message; never blocks."""
        self._outbox.send(_encode(message))

    def receive(self, timeout_s: float = 0.0) -> list[ToEngine]:
        """Everything that has arrived. With nothing there, wait up to `timeout_s` for a message, a `wake` or what is
        watched.

        Raises ProcessDied when the API process is gone: there is nobody left to answer to.
        """
        messages = self._drain()
        if messages or timeout_s < 0:
            return messages
        ready = dict(self._poller.poll(math.ceil(timeout_s * 1000)))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if self._parent_fd is not None and self._parent_fd in ready:
            raise ProcessDied("the API process is gone")
        return self._drain() if ready else messages

    def _drain(self) -> list[ToEngine]:
        messages: list[ToEngine] = []
        try:
            while True:
                messages.append(_decode_to_engine(self._inbox.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return messages

    def wake(self) -> None:
        """End a `receive` that waits. Thread-safe; does nothing after `close`."""
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self, flush_s: float = 1.0) -> None:
        """Close after giving queued messages up to `flush_s` to leave."""
        self._outbox.setsockopt(zmq.LINGER, int(flush_s * 1000))
        self._outbox.close()
        self._inbox.close()
        self._context.term()
        with self._wake_lock:
            self._closed = True
            os.close(self._wake_fd)


class NodeChannel:
    """The API process's end, on the running event loop. `on_message` is called for every message, in order."""

    def __init__(self, address: ChannelAddress, on_message: Callable[[FromEngine], None]) -> None:
        self._on_message = on_message
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outbox = _socket(self._context, zmq.PUSH)
        # Connected, not bound: a bound socket would block in `send` while no engine is there, for ever if it has died.
        self._outbox.connect(address.to_engine)
        self._inbox = _socket(self._context, zmq.PULL)
        self._inbox.bind(address.from_engine)
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._inbox.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        # The descriptor signals edges: what came before the reader was there must be asked for.
        self._loop.call_soon(self._drain)

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks."""
        self._outbox.send(_encode(message))

    def _drain(self) -> None:
        if self._inbox.closed:
            return
        try:
            while True:
                self._on_message(_decode_from_engine(self._inbox.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return

    def close(self, flush_s: float = 0.5) -> None:
        self._loop.remove_reader(self._fd)
        self._outbox.setsockopt(zmq.LINGER, int(flush_s * 1000))
        self._outbox.close()
        self._inbox.close()
        self._context.term()
