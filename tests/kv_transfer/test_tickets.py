"""Reads of many pieces under one ticket, which the engine offers on a GPU's host: against a stand-in of its calls."""

from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer import mooncake
from kv_transfer.config import TransferConfig
from kv_transfer.mooncake import MooncakeEngine, ReadState
from kv_transfer.pieces import Piece
from kv_transfer.regions import HostMemory, MemoryRegion
from runtime.errors import TransferError

PIECES = [Piece(5000, 90_000, 100), Piece(1000, 95_000, 300), Piece(2000, 70_000, 50)]


class Ticket:
    """Of a copy that ends after so many polls."""

    def __init__(self, polls: int, outcome: str) -> None:
        self._polls, self._outcome = polls, outcome
        self.drained = False
        self.waited_ms = 0

    def drain(self, timeout_ms: int) -> SimpleNamespace:
        self.waited_ms += timeout_ms
        self._polls = 0 if timeout_ms else self._polls - 1
        self.drained = self._polls <= 0
        return SimpleNamespace(name=self._outcome if self.drained else "COMPLETION_UNKNOWN")


class Raw:
    """The calls of the transfer engine that reads make."""

    def __init__(self, polls: int = 2, outcome: str = "COMPLETED") -> None:
        self.next = (polls, outcome)
        self.scattered: list[tuple[Any, ...]] = []
        self.singles: list[tuple[Any, ...]] = []
        self.batch_transfer_async_read = lambda *arguments: self.singles.append(arguments) or len(self.singles)

    def initialize(self, *_: str) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return 1

    def batch_register_memory(self, addresses: list[int], sizes: list[int]) -> int:
        return 0

    def submit_scatter_read(self, *arguments: Any) -> Ticket:
        self.scattered.append(arguments)
        return Ticket(*self.next)


class SlowMemory(HostMemory):
    """Of a device."""

    def __init__(self) -> None:
        self.settled = 0

    def settle(self) -> None:
        self.settled += 1


@pytest.fixture
def engine_of(monkeypatch):
    def make(raw: Raw, transport: str, memory: HostMemory | None = None) -> MooncakeEngine:
        monkeypatch.setattr(mooncake, "_load", lambda _: SimpleNamespace(TransferEngine=lambda: raw))
        said = {"protocol": mooncake.PROTOCOLS[transport]}
        monkeypatch.setattr(mooncake, "read_descriptor", lambda *_: said)
        return MooncakeEngine(TransferConfig(transport=transport), (MemoryRegion(4096, 64, 2),), memory or HostMemory())

    return make


def test_a_read_within_a_node_carries_its_pieces_as_offsets_in_one_range(engine_of):
    raw = Raw()
    engine = engine_of(raw, "intra_node")
    assert engine.max_pieces > len(PIECES)
    ticket = engine.submit("peer:1", PIECES)
    ((session, bases, spans, remote_bases, remote_spans, offsets, remote_offsets, lengths),) = raw.scattered
    assert (session, bases, spans, remote_bases, remote_spans) == ("peer:1", [1000], [4100], [70_000], [25_300])
    (mine,), (theirs,), (sizes,) = offsets, remote_offsets, lengths
    assert [
        Piece(bases[0] + here, remote_bases[0] + there, size)
        for here, there, size in zip(mine, theirs, sizes, strict=True)
    ] == PIECES
    assert [engine.poll(ticket), engine.poll(ticket)] == [ReadState.PENDING, ReadState.DONE]


def test_a_ticket_that_fails_is_a_failed_read_and_at_first_contact_an_unreachable_peer(engine_of):
    engine = engine_of(Raw(polls=2, outcome="FAILED_DRAINED"), "intra_node")
    ticket = engine.connect("peer:1", PIECES)
    assert engine.poll(ticket) is ReadState.FAILED
    engine = engine_of(Raw(polls=1, outcome="FAILED_DRAINED"), "intra_node")
    with pytest.raises(TransferError, match="cannot reach peer:1"):
        engine.connect("peer:1", PIECES)


def test_closing_waits_for_the_copies_of_tickets_that_were_not_polled_to_their_end(engine_of):
    engine = engine_of(Raw(polls=5), "intra_node")
    ticket = engine.submit("peer:1", PIECES)
    engine.close([ticket])
    assert ticket.drained
    assert ticket.waited_ms > 0


def test_over_tcp_a_read_is_one_piece(engine_of):
    raw = Raw()
    engine = engine_of(raw, "tcp")
    assert engine.max_pieces == 1
    assert engine.submit("peer:1", PIECES[:1]) == 1
    assert raw.singles == [("peer:1", [5000], [90_000], [100])]
    assert not raw.scattered


@pytest.mark.parametrize(("transport", "times"), [("tcp", 1), ("rdma", 1), ("intra_node", 0)])
def test_only_what_comes_through_the_host_or_a_network_device_has_to_settle(engine_of, transport, times):
    memory = SlowMemory()
    engine = engine_of(Raw(), transport, memory)
    engine.settle()
    assert memory.settled == times
    engine.close()
    assert memory.settled == 2 * times, "a read that never ended may have left something on its way"
