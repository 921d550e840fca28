"""Ranks that step together: nobody waits for ever, nobody steps for nothing, and whoever is lost is named."""

import socket
import threading
import time

import pytest

from benchmarks.lockstep import PATTERNS, check, idle_cost_us, walk
from engine.lockstep import RECORD_BYTES, Lockstep
from engine.parallel import StepIntent
from engine.peer_mesh import Listener, PeerMesh
from engine.peer_watch import PeerWatch
from runtime.errors import EngineError
from tests.engine.ranks import Rank, run_ranks


def intent(num_tokens: int, *, decode_only: bool = True, num_logits: int = 0) -> StepIntent:
    return StepIntent(num_tokens=num_tokens, decode_only=decode_only, num_logits=num_logits)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_distribution_of_work_stalls(pattern):
    steps = 500
    walks = run_ranks(
        4, lambda rank: walk(rank.lockstep, rank.group.mesh, rank.rank, PATTERNS[pattern](steps, rank.size))
    )
    check(pattern, steps, walks)


def test_idle_ranks_make_no_rounds():
    def body(rank: Rank) -> int:
        for _ in range(100):
            assert not rank.lockstep.agree(intent(0)).runs
        return rank.lockstep.num_rounds

    assert run_ranks(2, body) == [0, 0]
    assert idle_cost_us(calls=100) > 0


def test_everybody_learns_the_same_plan():
    def body(rank: Rank) -> list[object]:
        tokens, decode_only, num_logits = [(3, True, 3), (70, False, 1), (0, True, 0)][rank.rank]
        plan = rank.agree(tokens, decode_only=decode_only, num_logits=num_logits)
        assert rank.lockstep.plan is plan
        return [plan.num_tokens, plan.max_tokens, plan.decode_only, plan.max_logits, plan.runs]

    assert run_ranks(3, body) == [[(3, 70, 0), 70, False, 3, True]] * 3


def test_a_rank_that_leaves_ends_the_steps_of_all():
    def body(rank: Rank) -> str:
        if rank.rank == 0:
            rank.lockstep.agree(intent(1))
            rank.lockstep.leave()
            return "left"
        while not rank.lockstep.busy:
            rank.sleep()
        assert rank.lockstep.agree(intent(1)).runs
        assert not rank.lockstep.agree(intent(0)).runs
        assert not rank.lockstep.busy
        with pytest.raises(EngineError, match=r"rank\(s\) 0 left the group"):
            rank.lockstep.agree(intent(1))
        return "stopped"

    assert run_ranks(3, body) == ["left", "stopped", "stopped"]


def test_a_rank_whose_group_has_ended_does_not_live_on(monkeypatch):
    monkeypatch.setattr("engine.lockstep._ORPHAN_S", 0.2)

    def body(rank: Rank) -> str:
        if rank.rank == 0:
            rank.lockstep.leave()
            return "left"
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                if rank.lockstep.busy:
                    rank.lockstep.agree(intent(0))
                rank.sleep()
        except EngineError as error:
            return str(error)
        return "lived on"

    assert run_ranks(2, body) == ["left", "rank(s) 0 left the group: no rank steps without it"]


def test_a_peer_that_does_not_answer_is_an_error_and_no_hang():
    release = threading.Event()

    def body(rank: Rank) -> str:
        if rank.rank == 1:
            release.wait(60)
            return "silent"
        try:
            rank.lockstep.agree(intent(1))
        except EngineError as error:
            return str(error)
        finally:
            release.set()
        return "answered"

    answers = run_ranks(2, body, timeout_s=0.5)
    assert answers[0] == "rank 0 waited 0.5 s for rank(s) 1"


@pytest.mark.parametrize("idle", [True, False])
def test_a_peer_that_dies_is_noticed_at_once_and_named(idle):
    def body(rank: Rank) -> str:
        if not idle:
            rank.lockstep.agree(intent(1))
        if rank.rank == 1:
            # As the kernel does for a process that was killed.
            for connection in rank.group.mesh._peers.values():
                connection.shutdown(socket.SHUT_RDWR)
            return "died"
        while not rank.lockstep.busy:
            rank.sleep(30)
        with pytest.raises(EngineError, match="rank 0 lost rank 1") as caught:
            rank.lockstep.agree(intent(0))
        return str(caught.value)

    assert "lost rank 1" in run_ranks(2, body)[0]


def test_a_rank_that_drains_makes_all_drain_and_none_is_done_before_the_last():
    last_may_end = threading.Event()

    def body(rank: Rank) -> int:
        deadline = time.monotonic() + 60
        drained = False
        draining = rank.rank == 1
        while time.monotonic() < deadline:
            if rank.rank == 2:
                drained = draining and last_may_end.is_set()
            else:
                drained = draining
            plan = rank.lockstep.agree(StepIntent(0, True, 0, draining, drained))
            draining |= plan.draining
            assert not plan.drained or last_may_end.is_set()
            if plan.drained:
                return rank.lockstep.num_rounds
            if rank.rank == 2 and draining and rank.lockstep.num_rounds >= 2:
                last_may_end.set()
            elif not rank.lockstep.busy:
                rank.sleep()
        raise AssertionError(f"rank {rank.rank} never drained")

    rounds = run_ranks(3, body)
    assert len(set(rounds)) == 1
    assert rounds[0] <= 5, "news are told once"


def test_ranks_begin_together():
    came: list[int] = []

    def body(rank: Rank) -> list[int]:
        if rank.rank == 1:
            time.sleep(0.3)
        came.append(rank.rank)
        rank.lockstep.begin(60)
        return sorted(came)

    assert run_ranks(3, body) == [[0, 1, 2]] * 3


def test_ranks_find_their_smallest_number_before_they_begin():
    def body(rank: Rank) -> list[int]:
        return [rank.group.least(0, 60), rank.group.least(1_000_000 - rank.rank, 60)]

    assert run_ranks(3, body) == [[0, 999_998]] * 3


def test_ranks_that_are_configured_otherwise_are_refused_by_name():
    def body(rank: Rank) -> None:
        raise AssertionError("nobody may come this far")

    with pytest.raises(EngineError, match="rank 1 has part_tokens=9, but rank 0 of its group has 8"):
        run_ranks(2, body, terms=lambda rank: {"part_tokens": str(8 + rank)})


def connected_pair() -> tuple[PeerMesh, socket.socket]:
    ours, theirs = socket.socketpair()
    return PeerMesh(0, {1: ours}, RECORD_BYTES), theirs


def test_records_that_arrive_in_pieces_are_put_together():
    mesh, peer = connected_pair()
    record = bytes(range(RECORD_BYTES))
    peer.send(record[:5])
    assert mesh.pending
    feeder = threading.Timer(0.05, peer.send, (record[5:] + record,))
    feeder.start()
    assert mesh.receive(60)[1] == record
    assert mesh.receive(60)[1] == record
    mesh.close()
    peer.close()


def test_a_rank_in_another_round_is_refused():
    mesh, peer = connected_pair()
    other_mesh = PeerMesh(1, {0: peer}, RECORD_BYTES)
    other = Lockstep(other_mesh, 2, 60)
    other._round = 6

    def agree() -> None:
        with pytest.raises(EngineError):
            other.agree(intent(1))

    helper = threading.Thread(target=agree)
    helper.start()
    with pytest.raises(EngineError, match="rank 0 is in round 1, rank 1 in 7"):
        Lockstep(mesh, 2, 60).agree(intent(1))
    helper.join()
    mesh.close()
    other_mesh.close()


def test_a_farewell_is_heard_although_the_connection_was_reset_behind_it():
    """A rank that closes with a peer's record unread resets the connection."""
    server = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(server.getsockname())
    theirs, _ = server.accept()
    server.close()
    mesh, leaving_mesh = PeerMesh(0, {1: ours}, RECORD_BYTES), PeerMesh(1, {0: theirs}, RECORD_BYTES)
    staying, leaving = Lockstep(mesh, 2, 60), Lockstep(leaving_mesh, 2, 60)
    mesh.send(bytes(RECORD_BYTES))
    while not leaving_mesh.pending:
        time.sleep(0.001)
    leaving.leave()
    leaving_mesh.close()
    while not staying.busy:
        time.sleep(0.001)
    assert not staying.agree(intent(0)).runs
    with pytest.raises(EngineError, match="left the group"):
        staying.agree(intent(1))
    assert not mesh.is_lost, "it said farewell"
    mesh.close()


def test_strangers_do_not_get_into_the_group():
    token, deadline = b"t" * 16, time.monotonic() + 60
    listener, caller = Listener(0, "127.0.0.1"), Listener(1, "127.0.0.1")
    host, _, port = listener.address.rpartition(":")
    stranger = socket.create_connection((host, int(port)))
    stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    impostor = socket.create_connection((host, int(port)))
    impostor.sendall(b"x" * 16 + (1).to_bytes(4, "little"))
    found: dict[str, dict[int, socket.socket]] = {}

    def call() -> None:
        found["caller"] = caller.connect({0: listener.address}, token, deadline)

    helper = threading.Thread(target=call)
    helper.start()
    peers = listener.connect({1: caller.address}, token, deadline)
    helper.join()
    assert list(peers) == [1]
    found["caller"][0].send(b"hello")
    peers[1].settimeout(30)
    assert peers[1].recv(5) == b"hello"
    for connection in (stranger, impostor, *peers.values(), *found["caller"].values()):
        connection.close()


def test_ranks_that_never_come_are_named():
    listener = Listener(0, "127.0.0.1")
    with pytest.raises(TimeoutError, match=r"rank\(s\) 1, 2 did not call"):
        listener.connect({1: "127.0.0.1:9", 2: "127.0.0.1:9"}, b"t" * 16, time.monotonic() + 0.2)


@pytest.mark.parametrize("noticed", [True, False])
def test_a_step_thread_that_waits_for_a_lost_peer_is_freed(noticed):
    mesh, peer = connected_pair()
    aborted = threading.Event()

    def abort() -> None:
        aborted.set()
        mesh.stop_watching()

    watch = PeerWatch(mesh, abort, grace_s=0.2)
    peer.close()
    if noticed:
        with pytest.raises(EngineError, match="lost rank 1"):
            mesh.receive(60)
        watch._thread.join(60)
        assert not aborted.is_set()
    else:
        assert aborted.wait(60)
    assert mesh.is_lost == noticed
    watch.stop()
    mesh.close()
