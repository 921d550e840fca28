"""A connection to every other rank of a group, over which small records of one size go round.

Each rank sends one record to all others and takes one from each. Connections are plain TCP: a peer that dies is noticed
at once, also while nobody speaks, and a rank without work sleeps on `fileno` until somebody has something to say. Done
this way a round of four ranks costs a tenth of what a collective of a tensor library does.
"""

from __future__ import annotations

import hmac
import select
import socket
import struct
import time
from collections.abc import Mapping

from runtime.errors import EngineError

_HELLO = struct.Struct("<16sI")
"""The group's token and the caller's rank."""
_HELLO_S = 2.0
"""For a caller to say who it is: whoever else finds the port must not hold the group up for longer."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))
"""A host that lost power sends no farewell: 11 seconds of silence on the wire end the connection."""


class PeerMesh:
    """The connections of one rank. Belongs to the step thread, but for what says otherwise."""

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], record_bytes: int) -> None:
        """`peers`: connected sockets by rank, owned from now on."""
        self.rank = rank
        self._peers = dict(sorted(peers.items()))
        self._record_bytes = record_bytes
        self._partial = dict.fromkeys(self._peers, b"")
        self._rank_of = {connection.fileno(): peer for peer, connection in self._peers.items()}
        self._waiting_room = select.epoll()
        for connection in self._peers.values():
            connection.setblocking(False)
            self._waiting_room.register(connection, select.EPOLLIN)
        self._watched = True
        self._lost = False

    def fileno(self) -> int:
        """Readable when a peer has sent a record or is gone."""
        return self._waiting_room.fileno()

    @property
    def descriptors(self) -> list[int]:
        """Of the connections, for whoever only waits for their end."""
        return list(self._rank_of)

    @property
    def is_over(self) -> bool:
        """A peer has left or is gone, and the step thread knows. Thread-safe."""
        return not self._watched

    @property
    def is_lost(self) -> bool:
        """A peer has ended without a farewell that was heard."""
        return self._lost

    @property
    def pending(self) -> bool:
        """Whether `fileno` is readable."""
        return self._watched and bool(self._waiting_room.poll(0))

    def send(self, record: bytes) -> None:
        """To every peer; never blocks. That a peer is gone shows when its answer is awaited."""
        for peer, connection in self._peers.items():
            try:
                sent = connection.send(record)
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                continue
            except BlockingIOError:
                sent = 0
            if sent != len(record):
                raise EngineError(f"rank {self.rank}: rank {peer} reads nothing of what it is sent")

    def receive(self, timeout_s: float) -> dict[int, bytes]:
        """The next record of every peer, by rank. Raises EngineError naming the peer that is gone or late."""
        records: dict[int, bytes] = {}
        deadline = time.monotonic() + timeout_s
        # Only those that are missing: one that has answered may be ahead, and would end every wait at once.
        missing = select.poll()
        for descriptor in self._rank_of:
            missing.register(descriptor, select.POLLIN)
        while len(records) < len(self._peers):
            ready = missing.poll(max(0.0, 1000 * (deadline - time.monotonic())))
            if not ready:
                late = [peer for peer in self._peers if peer not in records]
                raise EngineError(f"rank {self.rank} waited {timeout_s:g} s for rank(s) {_listed(late)}")
            for descriptor, _ in ready:
                peer = self._rank_of[descriptor]
                record = self._read(peer)
                if record is not None:
                    records[peer] = record
                    missing.unregister(descriptor)
        return records

    def _read(self, peer: int) -> bytes | None:
        """The next record of a peer, None if only a part of it is there. Raises EngineError when the peer is gone."""
        partial = self._partial[peer]
        try:
            data = self._peers[peer].recv(self._record_bytes - len(partial))
        except ConnectionResetError:
            data = b""
        except OSError as error:
            self._lose()
            raise EngineError(f"rank {self.rank} lost rank {peer}: {error.strerror or error}") from None
        if not data:
            self._lose()
            raise EngineError(f"rank {self.rank} lost rank {peer}: it has ended")
        data = partial + data
        self._partial[peer] = data if len(data) < self._record_bytes else b""
        return None if self._partial[peer] else data

    def _lose(self) -> None:
        self._lost = True
        self.stop_watching()

    def stop_watching(self) -> None:
        """Nothing more is awaited: `fileno` is not readable any more, whatever the peers do."""
        if self._watched:
            self._watched = False
            for connection in self._peers.values():
                self._waiting_room.unregister(connection)

    def close(self) -> None:
        """What was sent still arrives."""
        self.stop_watching()
        self._waiting_room.close()
        for connection in self._peers.values():
            connection.close()


class Listener:
    """Where the ranks above this one connect. Open it, tell everybody `address`, then `connect`."""

    def __init__(self, rank: int, host: str) -> None:
        self.rank = rank
        self.host = host
        self._socket = socket.create_server((host, 0))
        self.address = f"{host}:{self._socket.getsockname()[1]}"

    def connect(self, addresses: Mapping[int, str], token: bytes, deadline: float) -> dict[int, socket.socket]:
        """To the ranks below, and from those above. `addresses`: of all other ranks; `token`: 16 bytes that every rank
        of this group knows; `deadline`: on the monotonic clock. Raises OSError; the listening socket is closed anyway.
        """
        peers: dict[int, socket.socket] = {}
        try:
            for peer, address in addresses.items():
                if peer < self.rank:
                    host, _, port = address.rpartition(":")
                    connection = socket.create_connection((host, int(port)), timeout=_left_s(deadline))
                    peers[peer] = connection
                    connection.sendall(_HELLO.pack(token, self.rank))
            above = {peer for peer in addresses if peer > self.rank}
            while above - peers.keys():
                self._socket.settimeout(_left_s(deadline))
                try:
                    connection, _ = self._socket.accept()
                except TimeoutError:
                    raise TimeoutError(f"rank(s) {_listed(sorted(above - peers.keys()))} did not call") from None
                peer_or_none = _who_calls(connection, token)
                if peer_or_none is None or peer_or_none not in above - peers.keys():
                    connection.close()
                else:
                    peers[peer_or_none] = connection
        except BaseException:
            for connection in peers.values():
                connection.close()
            raise
        finally:
            self._socket.close()
        for connection in peers.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        return peers

    def close(self) -> None:
        self._socket.close()


def _who_calls(connection: socket.socket, token: bytes) -> int | None:
    """The rank at the other end; None for a stranger."""
    connection.settimeout(_HELLO_S)
    hello = b""
    try:
        while len(hello) < _HELLO.size:
            part = connection.recv(_HELLO.size - len(hello))
            if not part:
                return None
            hello += part
    except OSError:
        return None
    said, rank = _HELLO.unpack(hello)
    return int(rank) if hmac.compare_digest(said, token) else None


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no time left")
    return left_s


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
