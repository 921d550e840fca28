"""Waking the idle ranks of a group: whoever gets work rings, and says which round of steps begins.

A rank that has nothing to do sleeps on its own channel; the bell's thread hears the ring and wakes it. One PULL socket
per rank, one PUSH to each of the others. Late and repeated rings are harmless: they name a round that is over.
"""

import threading
from collections.abc import Callable, Sequence

import zmq

_CLOSE = -1


class Bell:
    """One rank's bell. `ring` and `close` belong to one thread; `latest` may be read by it at any time."""

    def __init__(self, host: str, wake: Callable[[], None]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self.host = host
        self._port = self._socket.bind_to_random_port(f"tcp://{host}")
        self._wake = wake
        self._others: list[zmq.Socket[bytes]] = []
        self._own: zmq.Socket[bytes] | None = None
        self._thread = threading.Thread(target=self._listen, name="bell", daemon=True)
        self.latest = 0
        """The newest round that somebody has begun."""

    @property
    def address(self) -> str:
        return f"tcp://{self.host}:{self._port}"

    def connect(self, others: Sequence[str]) -> None:
        """The bells of all other ranks are known: start to listen."""
        self._own = self._push(self.address)
        self._others = [self._push(address) for address in others]
        self._thread.start()

    def ring(self, number: int) -> None:
        """Round `number` begins. Never blocks."""
        for socket in self._others:
            socket.send(str(number).encode())

    def close(self) -> None:
        if self._own is not None:
            self._own.send(str(_CLOSE).encode())
            self._thread.join()
        self._context.destroy(linger=0)

    def _push(self, address: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(address)
        return socket

    def _listen(self) -> None:
        while (number := int(self._socket.recv())) != _CLOSE:
            if number > self.latest:
                self.latest = number
                self._wake()
