"""Reads from peers: a bounded window of them, oldest polled first, groups that end exactly once.

A group is what one announcement started: pieces, of which one read takes as many as the engine likes. It ends when
none of its reads is queued or in flight: from then on nothing of it touches memory. Dropping a group only stops what
was not submitted yet.

A failed read is tried again: after an outage the engine fails the first read on each connection that it had to drop,
without trying to connect. Reading again is harmless, and a peer that is gone is known from its control stream.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from kv_transfer.mooncake import MooncakeEngine, ReadHandle, ReadState
from kv_transfer.pace import Pace
from kv_transfer.pieces import Piece, split
from kv_transfer.stats import TransferCounters
from kv_transfer.threads import SteadyThread
from runtime.errors import TransferError

log = logging.getLogger(__name__)

_MAX_TRIES = 3
_EPISODE_S = 0.5
"""Failures closer together than this have one cause."""


class ReadGroup:
    """Reads from one session that succeed or fail together. Times are the reader's clock, seconds.

    `runs` are read in parts of at most `max_bytes`, which are made as they are needed: the first read does not wait for
    the plan of the last.
    """

    def __init__(
        self, session_id: str, runs: Sequence[Piece], max_bytes: int, on_end: Callable[["ReadGroup"], None]
    ) -> None:
        self.session_id = session_id
        self.num_bytes = sum(run.num_bytes for run in runs)
        self.num_done = 0
        self.on_end = on_end
        self.in_flight = 0
        self.failure: str | None = None
        self.started: float | None = None
        self.progress: float | None = None
        """When a read of it last succeeded."""
        self._fresh = split(runs, max_bytes)
        self._next = next(self._fresh, None)
        self._again = deque[tuple[Piece, int]]()
        """What failed, and which try comes next."""

    def take(self, max_pieces: int) -> tuple[list[Piece], int]:
        """Up to that many pieces to read now, and which try it is of all of them. Only while `queued`."""
        if self._next is not None:
            pieces = [self._next, *islice(self._fresh, max_pieces - 1)]
            self._next = next(self._fresh, None)
            return pieces, 1
        piece, tries = self._again.popleft()
        pieces = [piece]
        while len(pieces) < max_pieces and self._again and self._again[0][1] == tries:
            pieces.append(self._again.popleft()[0])
        return pieces, tries

    def repeat(self, pieces: Sequence[Piece], tries: int) -> None:
        """They failed: read them once more, for the `tries`-th time."""
        self._again.extend((piece, tries) for piece in pieces)

    def fail(self, reason: str) -> None:
        """Submit nothing more of it. The first reason stays."""
        self.failure = self.failure or reason
        self._next = None
        self._again.clear()

    def drop(self) -> None:
        """Submit nothing more of it, if there is more."""
        if self.queued:
            self.fail("dropped")

    @property
    def queued(self) -> bool:
        """Something of it has not been submitted."""
        return self._next is not None or bool(self._again)

    @property
    def over(self) -> bool:
        return not self.in_flight and not self.queued


class _Read:
    """One read under way, of pieces that are tried equally often."""

    __slots__ = ("group", "handle", "num_bytes", "pieces", "submitted", "tries")

    def __init__(self, group: ReadGroup, pieces: list[Piece], tries: int, submitted: float) -> None:
        self.handle: ReadHandle = None
        self.group = group
        self.pieces = pieces
        self.tries = tries
        self.submitted = submitted
        self.num_bytes = sum(piece.num_bytes for piece in pieces)


class _Session:
    """A peer's engine. Until the first submit returned it is closed; nobody else submits meanwhile."""

    def __init__(self) -> None:
        self.groups: deque[ReadGroup] = deque()
        self.reads: deque[_Read] = deque()
        self.open = False
        self.failures = 0
        """Episodes of failure since a read last succeeded, or since the peer was last found not to answer."""
        self.failed_at = float("-inf")
        self.answers = False
        """The peer answered a probe after a failure."""
        self.forgotten = False

    @property
    def idle(self) -> bool:
        return not self.groups and not self.reads


class Reader:
    """The one owner of read ids. Call `pump` while `busy`."""

    def __init__(
        self,
        engine: MooncakeEngine,
        *,
        window: int,
        clock: Callable[[], float],
        counters: TransferCounters,
        wake: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._window = window
        self._clock = clock
        self._counters = counters
        self._wake = wake
        self._sessions: dict[str, _Session] = {}
        self._groups: set[ReadGroup] = set()
        self._in_flight = 0
        self._flying = 0
        """Bytes in flight."""
        self._pace = Pace(len(os.sched_getaffinity(0)))
        self._opening: _Read | None = None
        self._contacts = SteadyThread("first-contact")

    def start(self, group: ReadGroup) -> None:
        """Its first reads are submitted before this returns."""
        if not self._groups:
            self._pace.begin(self._clock())
        session = self._sessions.setdefault(group.session_id, _Session())
        session.forgotten = False
        session.groups.append(group)
        self._groups.add(group)
        self._submit()
        self._wake()

    def close(self) -> None:
        """Only once the engine is closed: reads that a thread of ours submitted depend on that thread."""
        self._contacts.close()

    @property
    def busy(self) -> bool:
        return bool(self._groups)

    @property
    def nap_s(self) -> float:
        """How long to wait before the next `pump`, now that one is over."""
        left = sum(group.num_bytes - group.num_done for group in self._groups)
        return self._pace.nap_s(self._clock(), self._flying, left)

    @property
    def is_opening(self) -> bool:
        """A helper thread is inside the engine, which must not be destroyed meanwhile."""
        return self._opening is not None

    @property
    def handles(self) -> list[ReadHandle]:
        """Of all reads under way."""
        return [read.handle for session in self._sessions.values() for read in session.reads]

    @property
    def num_in_flight(self) -> int:
        return self._in_flight

    @property
    def oldest_submitted(self) -> float | None:
        """When the oldest unfinished read was submitted."""
        times = [session.reads[0].submitted for session in self._sessions.values() if session.reads]
        if self._opening is not None:
            times.append(self._opening.submitted)
        return min(times, default=None)

    def failing_sessions(self) -> list[str]:
        """Sessions whose last read failed: worth a probe, whose result goes to `is_wedged`."""
        return [session_id for session_id, session in self._sessions.items() if session.failures]

    def is_wedged(self, session_id: str, answers: bool, failures: int) -> bool:
        """Whether reads failed in `failures` episodes although the peer answered all the time, and answers now."""
        session = self._sessions.get(session_id)
        if session is None:
            return False
        if not (answers and session.answers):
            # What failed before the peer was known to answer may have been its fault.
            session.answers, session.failures = answers, 0
        return session.failures >= failures

    def forget(self, session_id: str) -> None:
        """The peer is gone: drop what is known of its session once nothing of it is in flight."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.forgotten = True
            if session.idle:
                del self._sessions[session_id]

    def pump(self) -> bool:
        """Collect what ended, submit what fits. True if anything moved."""
        ended = self._poll()
        submitted = self._submit()
        self._finish_groups()
        return ended or submitted

    def check_integrity(self) -> None:
        """Raises AssertionError when reads and groups do not add up."""
        per_group: dict[ReadGroup, int] = {}
        for session in self._sessions.values():
            for read in session.reads:
                per_group[read.group] = per_group.get(read.group, 0) + 1
        if self._opening is not None:
            per_group[self._opening.group] = per_group.get(self._opening.group, 0) + 1
        assert sum(per_group.values()) == self._in_flight, f"{self._in_flight} reads counted, found {per_group}"
        for group in self._groups | per_group.keys():
            assert group in self._groups, f"a read of {group.session_id} is in flight for a group that ended"
            assert group.in_flight == per_group.get(group, 0), f"a group counts {group.in_flight} reads in flight"

    def _poll(self) -> bool:
        moved = False
        for session in self._sessions.values():
            while session.reads:
                state = self._engine.poll(session.reads[0].handle)
                if state is ReadState.PENDING:
                    break
                self._end(session, session.reads.popleft(), state)
                moved = True
        return moved

    def _end(self, session: _Session, read: _Read, state: ReadState) -> None:
        self._leave(read)
        group = read.group
        if state is ReadState.DONE:
            group.progress = self._clock()
            group.num_done += read.num_bytes
            self._pace.arrive(read.num_bytes, self._flying, group.progress)
            session.failures, session.answers = 0, False
            self._counters.reads_done += 1
            self._counters.bytes_received += read.num_bytes
        else:
            self._failed(session, read, f"a read of {read.num_bytes} bytes from {group.session_id} failed")

    def _failed(self, session: _Session, read: _Read, reason: str) -> None:
        now = self._clock()
        if now - session.failed_at > _EPISODE_S:
            session.failures += 1
        session.failed_at = now
        self._counters.reads_failed += 1
        group = read.group
        if read.tries < _MAX_TRIES and group.failure is None:
            group.repeat(read.pieces, read.tries + 1)
        else:
            group.fail(f"{reason}, try {read.tries}")

    def _submit(self) -> bool:
        moved = False
        while self._in_flight < self._window and self._opening is None:
            before = self._in_flight
            for session_id, session in self._sessions.items():
                group = next((group for group in session.groups if group.queued), None)
                if group is None or self._in_flight >= self._window:
                    continue
                self._submit_one(session_id, session, group)
                moved = True
                if self._opening is not None:
                    return True
            if self._in_flight == before:
                break
        return moved

    def _submit_one(self, session_id: str, session: _Session, group: ReadGroup) -> None:
        now = self._clock()
        group.started = now if group.started is None else group.started
        read = _Read(group, *group.take(self._engine.max_pieces), now)
        self._counters.reads_submitted += 1
        if not session.open:
            self._open(session, read)
            return
        try:
            read.handle = self._engine.submit(session_id, read.pieces)
        except TransferError as error:
            self._failed(session, read, str(error))
            return
        self._enter(read)
        session.reads.append(read)

    def _enter(self, read: _Read) -> None:
        read.group.in_flight += 1
        self._in_flight += 1
        self._flying += read.num_bytes

    def _leave(self, read: _Read) -> None:
        read.group.in_flight -= 1
        self._in_flight -= 1
        self._flying -= read.num_bytes

    def _open(self, session: _Session, read: _Read) -> None:
        """The first submit connects, and may block while holding a lock that every submit needs: off this thread."""
        self._opening = read
        self._enter(read)
        call = self._contacts.run(lambda: self._engine.connect(read.group.session_id, read.pieces))
        call.add_done_callback(lambda done: self._opened(session, read, done))

    def _opened(self, session: _Session, read: _Read, call: "asyncio.Future[ReadHandle]") -> None:
        self._opening = None
        error = call.exception()
        if error is not None:
            self._leave(read)
            self._failed(session, read, str(error))
        else:
            session.open = True
            read.handle = call.result()
            session.reads.append(read)
        self._wake()

    def _finish_groups(self) -> None:
        for session_id, session in list(self._sessions.items()):
            over = [group for group in session.groups if group.over]
            if not over:
                continue
            session.groups = deque(group for group in session.groups if not group.over)
            self._engine.settle()
            for group in over:
                self._groups.discard(group)
                group.on_end(group)
            if session.forgotten and session.idle:
                del self._sessions[session_id]
