"""One request to a node, and its response as far as it is here: plain attributes, and a call whenever they changed."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from router.http1 import ResponseHead

if TYPE_CHECKING:
    from router.node_connection import NodeConnection
    from router.upstream import Origin

HIGH_WATER_BYTES = 256 * 1024
"""An exchange whose owner does not take this much stops reading from the node."""

Way = Callable[[bytes], bool]
"""Where bytes may go: says whether it took them; if not, nothing happened."""


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
        "write_chunk",
    )

    def __init__(self, origin: "Origin", on_change: Callable[[], None]) -> None:
        self._origin = origin
        self._connection: NodeConnection | None = None
        self._pieces: list[bytes] = []
        self._relay: Way | None = None
        self.write_chunk: Way | None = None
        """Where whole chunks may go as they are, once the relay took everything before."""
        self._size = 0
        self.on_change = on_change
        self.head: ResponseHead | None = None
        self.notes = bytearray()
        """Extensions of the chunks that came (`ResponseParser.notes`)."""
        self.complete = False
        """The whole response has arrived (its last pieces may still wait to be taken)."""
        self.error: UpstreamError | None = None
        self.heard_at = 0.0
        """When bytes last came (loop time); what took the short way counts from the next look at deadlines."""
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

    def relay_to(self, relay: Way, write_chunk: Way | None) -> None:
        """Offer body bytes to `relay` as they come instead of waking the owner; what it leaves waits to be taken.

        While nothing waits, chunks with whole events go to `write_chunk`, if there is one, framed as they came.
        """
        self._relay, self.write_chunk = relay, write_chunk
        if self._connection is not None:
            self._connection.acknowledge_lazily()

    def close(self) -> None:
        """Forget it. An unfinished request is cancelled by closing its connection, which is how nodes learn of it."""
        self.on_change = _ignore
        self._relay = self.write_chunk = None
        if self.open:
            self.fail(ConnectionBroken("closed here"))

    def node_lost(self, reason: str) -> None:
        if self.open:
            self.fail(NodeLost(f"{self._origin.name} is gone: {reason}"))

    # For connection and origin

    def begin_on(self, connection: "NodeConnection", notes: bytearray) -> None:
        """The request goes out there, and the answer's notes will come into `notes`."""
        self._connection, self.notes = connection, notes

    def fail(self, error: UpstreamError) -> None:
        """It ends without a complete answer."""
        self.error = error
        self._origin.forget(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()
        self.on_change()

    def connection_lost(self) -> None:
        """There is nothing left to pause, resume or abandon."""
        self._connection = None

    def heard(self, now: float) -> None:
        """Look whether something took the short way since the last look."""
        if self._connection is not None and self._connection.took_short_way:
            self._connection.took_short_way = False
            self.heard_at = now

    def arrived(self, head: ResponseHead, pieces: list[bytes], complete: bool) -> bool:
        """Take what came. True: the relay has all of it, and all that came before."""
        self.head = head
        if pieces:
            relay = self._relay if not self._pieces else None
            if relay is not None and relay(pieces[0] if len(pieces) == 1 else b"".join(pieces)):
                if not complete:
                    return True
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
        return False
