"""The sockets between the API processes of a node and one of its engine processes: typed messages, batched, in order.

PUSH/PULL on Unix sockets in a directory that only this user can enter: one way in for all API processes, one way out to
each, so that tokens reach the process that asked for them without a stop. All queues are unbounded on purpose: what may
be outstanding is bounded where requests are admitted, and a full socket must never block the step loop. Bytes are made
here and nowhere else.
"""

import asyncio
import math
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from runtime.errors import ProcessDied
from runtime.replies import Replies
from runtime.requests import FromEngine, ToEngine
from runtime.steps import joined
from runtime.token_ids import TokenIds


def _to_wire(value: object) -> object:
    if isinstance(value, TokenIds):
        return value.to_bytes()
    raise TypeError(f"{type(value).__name__} does not cross the channel")


def _from_wire(kind: type[Any], value: Any) -> TokenIds:
    assert kind is TokenIds
    return TokenIds.from_bytes(value) if isinstance(value, bytes) else TokenIds(value)


_encode = msgspec.msgpack.Encoder(enc_hook=_to_wire).encode
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine, dec_hook=_from_wire).decode
_decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


class ChannelAddress(msgspec.Struct, frozen=True):
    """Where one engine process and its API processes meet. `directory` is created by the node process, mode 0700."""

    directory: str
    rank: int
    num_readers: int = 1
    """API processes of the node; number 0 is the node process, which also owns the engine process."""

    @property
    def to_engine(self) -> str:
        return f"ipc://{Path(self.directory) / f'rank{self.rank}.in'}"

    def from_engine(self, reader: int) -> str:
        return f"ipc://{Path(self.directory) / f'rank{self.rank}.out{reader}'}"


def _socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket


def _sender(context: "zmq.Context[zmq.Socket[bytes]]", address: ChannelAddress, reader: int) -> "zmq.Socket[bytes]":
    socket = _socket(context, zmq.PUSH)
    socket.connect(address.from_engine(reader))
    return socket


class EngineChannel:
    """The engine's end. Belongs to the step thread; only `wake` may be called from elsewhere."""

    def __init__(self, address: ChannelAddress) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox = _socket(self._context, zmq.PULL)
        self._inbox.bind(address.to_engine)
        self._outboxes = [_sender(self._context, address, reader) for reader in range(address.num_readers)]
        self._replies = Replies(address.num_readers)
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
        """Queue a message for whoever it concerns; never blocks."""
        for reader, part in self._replies.split(message):
            self._outboxes[reader].send(_encode(part))

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
                message = _decode_to_engine(self._inbox.recv(zmq.NOBLOCK))
                if len(self._outboxes) > 1:
                    self._replies.asked(message)
                messages.append(message)
        except zmq.Again:
            return messages

    def wake(self) -> None:
        """End a `receive` that waits. Thread-safe; does nothing after `close`."""
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self, flush_s: float = 1.0) -> None:
        """Close after giving queued messages up to `flush_s` to leave."""
        for outbox in self._outboxes:
            outbox.close(linger=int(flush_s * 1000))
        self._inbox.close()
        self._context.term()
        with self._wake_lock:
            self._closed = True
            os.close(self._wake_fd)


def announce(address: ChannelAddress, message: FromEngine, flush_s: float = 0.5) -> None:
    """Tell every API process but the node process something about an engine process that cannot say it any more."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for reader in range(1, address.num_readers):
        outbox = _sender(context, address, reader)
        outbox.send(_encode(message))
        outbox.close(linger=int(flush_s * 1000))
    context.term()


class NodeChannel:
    """An API process's end, on the running event loop. `on_message` is called for every message, in order.

    Steps that arrive together are one message.
    """

    def __init__(self, address: ChannelAddress, on_message: Callable[[FromEngine], None], reader: int = 0) -> None:
        self._on_message = on_message
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outbox = _socket(self._context, zmq.PUSH)
        # Connected, not bound: a bound socket would block in `send` while no engine is there, for ever if it has died.
        self._outbox.connect(address.to_engine)
        self._inbox = _socket(self._context, zmq.PULL)
        self._inbox.bind(address.from_engine(reader))
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._inbox.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        # The descriptor signals edges: what came before the reader was there must be asked for.
        self._loop.call_soon(self._drain)

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks."""
        self._outbox.send(_encode(message))

    def _drain(self) -> None:
        if not self._inbox.closed:
            for message in joined(self._arrived()):
                self._on_message(message)

    def _arrived(self) -> list[FromEngine]:
        messages: list[FromEngine] = []
        try:
            while True:
                messages.append(_decode_from_engine(self._inbox.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return messages

    def close(self, flush_s: float = 0.5) -> None:
        self._loop.remove_reader(self._fd)
        self._outbox.close(linger=int(flush_s * 1000))
        self._inbox.close()
        self._context.term()
