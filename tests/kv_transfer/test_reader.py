"""The reader's bookkeeping, with an engine whose reads end when the test says so."""

import asyncio
import threading

import pytest

from kv_transfer.mooncake import ReadState
from kv_transfer.pieces import Piece
from kv_transfer.reader import Reader, ReadGroup
from kv_transfer.stats import TransferCounters
from runtime.errors import TransferError


class ScriptedEngine:
    """Takes reads and ends them on command. Complains about ids that are not in flight, as the real one crashes."""

    def __init__(self, max_pieces: int) -> None:
        self.max_pieces = max_pieces
        self.states: dict[int, ReadState] = {}
        self.pieces: dict[int, list[Piece]] = {}
        self.threads: set[threading.Thread] = set()
        self.refusals = 0
        self.unsettled = 0
        """Reads that ended since memory was last settled."""
        self._next = 1

    def submit(self, session_id: str, pieces: list[Piece]) -> int:
        assert 1 <= len(pieces) <= self.max_pieces
        self.threads.add(threading.current_thread())
        if self.refusals:
            self.refusals -= 1
            raise TransferError(f"refused by {session_id}")
        read_id = self._next
        self._next += 1
        self.states[read_id], self.pieces[read_id] = ReadState.PENDING, pieces
        return read_id

    connect = submit

    def poll(self, read_id: int) -> ReadState:
        state = self.states[read_id]
        if state is not ReadState.PENDING:
            del self.states[read_id]
            self.unsettled += 1
        return state

    def settle(self) -> None:
        self.unsettled = 0

    def end(self, state: ReadState = ReadState.DONE, count: int | None = None) -> None:
        for read_id in list(self.states)[:count]:
            self.states[read_id] = state


class Bench:
    def __init__(self, window: int = 4, max_pieces: int = 1) -> None:
        self.now = 0.0
        self.engine = ScriptedEngine(max_pieces)
        self.counters = TransferCounters()
        self.reader = Reader(
            self.engine,  # type: ignore[arg-type]
            window=window,
            clock=lambda: self.now,
            counters=self.counters,
            wake=lambda: None,
        )
        self.ended: list[ReadGroup] = []

    def _on_end(self, group: ReadGroup) -> None:
        assert not self.engine.unsettled, "what was read may not be in memory yet"
        self.ended.append(group)

    def start(self, count: int, session_id: str = "peer:1") -> ReadGroup:
        pieces = [Piece(4096 * (n + 1), 8192 * (n + 1), 4096) for n in range(count)]
        group = ReadGroup(session_id, pieces, 4096, self._on_end)
        self.reader.start(group)
        return group

    async def pump(self) -> None:
        """Until nothing moves; first contacts happen in a thread."""
        for _ in range(50):
            self.reader.pump()
            self.reader.check_integrity()
            while self.reader.is_opening:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_no_more_reads_are_in_flight_than_the_window_holds(bench):
    group = bench.start(10)
    await bench.pump()
    assert bench.reader.num_in_flight == 4
    for _ in range(3):
        bench.engine.end()
        await bench.pump()
    assert bench.ended == [group]
    assert (group.failure, group.num_bytes) == (None, 40960)
    assert not bench.reader.busy


async def test_reads_of_an_open_session_are_under_way_before_start_returns(bench):
    bench.start(1)
    await bench.pump()
    bench.engine.end()
    await bench.pump()
    bench.start(3)
    assert bench.reader.num_in_flight == 3


async def test_the_pause_between_looks_follows_the_rate_and_is_shortest_without_reads(bench):
    assert bench.reader.nap_s < 0.0001
    bench.start(4)
    await bench.pump()
    bench.now += 0.004
    bench.engine.end(count=1)
    await bench.pump()
    assert bench.reader.nap_s == pytest.approx(0.003)
    bench.now += 0.005
    assert bench.reader.nap_s == pytest.approx(0.0005)
    bench.engine.end()
    await bench.pump()
    assert bench.reader.nap_s < 0.0001


async def test_only_one_read_is_submitted_until_a_session_is_open(bench):
    bench.start(3)
    bench.start(3, "peer:2")
    bench.reader.pump()
    assert bench.reader.num_in_flight == 1
    await bench.pump()
    assert bench.reader.num_in_flight == 4


async def test_a_failed_read_is_tried_again_and_its_group_fails_when_it_keeps_failing(bench):
    group = bench.start(2)
    await bench.pump()
    bench.engine.end(ReadState.FAILED, 1)
    await bench.pump()
    assert bench.ended == []
    bench.engine.end()
    await bench.pump()
    assert bench.ended == [group]
    assert group.failure is None
    assert bench.counters.reads_failed == 1

    hopeless = bench.start(2)
    for _ in range(3):
        await bench.pump()
        bench.engine.end(ReadState.FAILED)
    await bench.pump()
    assert bench.ended[1:] == [hopeless]
    assert "4096 bytes from peer:1 failed, try 3" in (hopeless.failure or "")


@pytest.mark.parametrize("outcomes", [[ReadState.DONE] * 3, [ReadState.DONE, *[ReadState.FAILED] * 5]])
async def test_memory_is_settled_before_the_end_of_a_group_is_told_whatever_its_outcome(bench, outcomes):
    group = bench.start(3)
    await bench.pump()
    for state in outcomes:
        bench.engine.end(state, 1)
        await bench.pump()
    group.drop()
    bench.engine.end()
    await bench.pump()
    assert bench.ended == [group]
    assert (group.failure is None) == (ReadState.FAILED not in outcomes)


async def test_a_group_that_failed_or_was_dropped_ends_only_when_its_last_read_has(bench):
    group = bench.start(10)
    await bench.pump()
    group.drop()
    await bench.pump()
    assert bench.ended == []
    bench.engine.end(count=3)
    await bench.pump()
    assert bench.ended == []
    bench.engine.end(ReadState.FAILED)
    await bench.pump()
    assert bench.ended == [group]
    assert group.failure == "dropped"
    assert bench.counters.reads_submitted == 4


async def test_a_submit_that_the_engine_refuses_counts_as_a_failed_read(bench):
    bench.engine.refusals = 3
    group = bench.start(1)
    await bench.pump()
    assert bench.ended == [group]
    assert group.failure is not None


async def test_a_peer_that_does_not_answer_holds_nobody_else_up(bench):
    stuck = bench.start(2, "stuck:1")
    await bench.pump()
    other = bench.start(6, "other:1")
    await bench.pump()
    for _ in range(6):
        for read_id, (piece,) in bench.engine.pieces.items():
            if read_id in bench.engine.states and read_id > 2:
                bench.engine.states[read_id] = ReadState.DONE
                assert piece.num_bytes == 4096
        await bench.pump()
    assert bench.ended == [other]
    assert not stuck.over


async def test_a_session_is_wedged_only_if_reads_fail_while_its_peer_answers(bench):
    async def fail_once() -> None:
        bench.now += 10.0
        bench.start(1)
        await bench.pump()
        bench.engine.end(ReadState.FAILED)
        await bench.pump()

    def wedged(answers: bool) -> bool:
        return bench.reader.is_wedged("peer:1", answers, 3)

    for _ in range(5):
        await fail_once()
    assert bench.reader.failing_sessions() == ["peer:1"]
    assert not wedged(False), "the peer was away"
    for _ in range(5):
        await fail_once()
    assert not wedged(True), "whether it was away before is not known"
    assert bench.reader.failing_sessions() == []
    for failures in range(1, 4):
        await fail_once()
        assert wedged(True) == (failures == 3)
    bench.start(1)
    await bench.pump()
    for _ in range(4):
        bench.engine.end()
        await bench.pump()
    assert bench.reader.failing_sessions() == []


async def test_a_session_of_a_peer_that_left_is_forgotten_once_it_is_quiet(bench):
    group = bench.start(1)
    await bench.pump()
    bench.reader.forget("peer:1")
    assert bench.reader.oldest_submitted == 0.0
    bench.engine.end()
    await bench.pump()
    assert bench.ended == [group]
    assert bench.reader._sessions == {}


async def test_one_read_takes_as_many_pieces_as_the_engine_likes_and_all_of_them_are_tried_again():
    bench = Bench(window=2, max_pieces=4)
    group = bench.start(11)
    await bench.pump()
    assert [len(pieces) for pieces in bench.engine.pieces.values()] == [4, 4]
    first, second = bench.engine.states
    bench.engine.states |= {first: ReadState.FAILED, second: ReadState.DONE}
    await bench.pump()
    # What never failed goes first, and is not mixed with what did.
    assert [len(pieces) for pieces in bench.engine.pieces.values()] == [4, 4, 3, 4]
    bench.engine.end()
    await bench.pump()
    assert bench.ended == [group]
    assert group.failure is None
    assert bench.counters.bytes_received == group.num_bytes == 11 * 4096
    assert bench.counters.reads_failed == 1


async def test_the_thread_of_first_contacts_lives_until_the_reader_is_closed(bench):
    bench.start(1)
    bench.start(1, "peer:2")
    await bench.pump()
    (thread,) = bench.engine.threads
    assert thread is not threading.current_thread()
    bench.engine.end()
    await bench.pump()
    assert thread.is_alive(), "what the engine keeps for the thread that submitted goes with it"
    bench.reader.close()
    thread.join(10)
    assert not thread.is_alive()
