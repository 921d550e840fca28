"""Events on their way to clients, gathered over one turn of the event loop and then written one after the other.

Writing each one as it is read would wake its client each time, which then often runs in our place, and would change
between two long ways through the kernel hundreds of times a turn. Gathered, an event costs a tenth less; it waits for
the reads of this turn, and for no more than MOST of them.
"""

import asyncio
from typing import Protocol

MOST = 128


class Client(Protocol):
    """Whom something is for."""

    def write_out(self, data: bytes) -> None:
        """Write to the socket, never raising."""


class Outbox:
    """What is to be written in this turn, in the order in which it came."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_soon = loop.call_soon
        self._waiting: list[tuple[Client, bytes]] = []

    def add(self, client: Client, data: bytes) -> None:
        """`client.write_out(data)` before this turn of the event loop is over."""
        waiting = self._waiting
        if not waiting:
            self._call_soon(self.flush)
        waiting.append((client, data))
        if len(waiting) >= MOST:
            self.flush()

    def flush(self) -> None:
        """Write everything now."""
        waiting, self._waiting = self._waiting, []
        for client, data in waiting:
            client.write_out(data)
