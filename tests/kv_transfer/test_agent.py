"""Two agents in one process, and what an agent refuses from its own engine."""

import threading
import time

import numpy as np
import pytest

from kv_transfer.agent import TransferAgent
from kv_transfer.agent_events import AgentEvent, Quiet, Received, ReceiveFailed, SendEnded
from kv_transfer.config import TransferConfig
from kv_transfer.format import StateFormat
from kv_transfer.regions import HostMemory, MemoryRegion
from runtime.errors import TransferError

PAGE, SLOT, COUNT = 50_000, 300_000, 40
FORMAT = StateFormat(model_fingerprint="m", layout={}, page_bytes=PAGE, slot_bytes=SLOT, page_tokens=256)


class WatchedMemory(HostMemory):
    def __init__(self) -> None:
        self.bound: list[str] = []
        """Names of the threads that were bound to a device."""

    def bind_thread(self) -> None:
        self.bound.append(threading.current_thread().name)


class Side:
    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.pages = generator.integers(0, 256, (COUNT, PAGE), dtype=np.uint8)
        self.slots = generator.integers(0, 256, (4, SLOT), dtype=np.uint8)
        self.rung = threading.Event()
        self.backlog: list[AgentEvent] = []
        self.memory = WatchedMemory()
        self.agent = TransferAgent(
            TransferConfig(verify="sample"),
            FORMAT,
            pages=MemoryRegion(self.pages.ctypes.data, PAGE, COUNT),
            slots=MemoryRegion(self.slots.ctypes.data, SLOT, 4),
            rank=0,
            wake=self.rung.set,
            memory=self.memory,
        )
        self.agent.start(20.0)

    def next_event(self):
        until = time.monotonic() + 10.0
        while not self.backlog:
            self.backlog += self.agent.poll()
            assert time.monotonic() < until, "no event"
            self.rung.wait(0.05)
            self.rung.clear()
        return self.backlog.pop(0)


@pytest.fixture(scope="module")
def sides():
    both = Side(1), Side(2)
    yield both
    for side in both:
        side.agent.stop()


def test_bytes_are_equal_and_untouched_records_stay_as_they_were(sides):
    prefill, decode = sides
    before = decode.pages.copy(), decode.slots.copy()
    prefill.agent.open_send("t", 256 * 10 + 1, b"h")
    decode.agent.open_receive("t", prefill.agent.address, prefill.agent.epoch, 256 * 10 + 1, b"h", range(20, 31), 3)
    prefill.agent.publish_pages("t", range(3, 8))
    prefill.agent.publish_ready("t", range(8, 14), 1, b"\x00first")
    event = decode.next_event()
    assert isinstance(event, Received)
    assert event.payload == b"\x00first"
    assert prefill.next_event() == SendEnded("t", "fetched")
    assert np.array_equal(decode.pages[20:31], prefill.pages[3:14])
    assert np.array_equal(decode.slots[3], prefill.slots[1])
    assert np.array_equal(decode.pages[:20], before[0][:20])
    assert np.array_equal(decode.pages[31:], before[0][31:])
    assert np.array_equal(decode.slots[:3], before[1][:3])
    for side in sides:
        side.agent.check_integrity()


def test_every_thread_that_calls_the_transfer_engine_is_bound_to_the_pools_device_first(sides):
    prefill, decode = sides
    assert prefill.memory.bound[0] == decode.memory.bound[0] == "transfer-0"
    assert "first-contact" in decode.memory.bound


def test_the_counters_can_be_looked_at_without_waiting(sides):
    _, decode = sides
    deadline = time.monotonic() + 30.0
    while (seen := decode.agent.latest_stats) is None or seen.received < 1:
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
    assert seen.reads_done >= 2, "pages side by side are read in one go"
    assert (seen.reads_failed, seen.receiving, seen.reads_in_flight, seen.quarantined_pages) == (0, 0, 0, 0)
    assert seen.bytes_received == decode.agent.stats().bytes_received == 11 * PAGE + SLOT


def test_a_rank_may_fetch_from_itself(sides):
    prefill, _ = sides
    prefill.agent.open_send("self", 256, b"h")
    prefill.agent.publish_ready("self", [0], 0, b"")
    prefill.agent.open_receive("self", prefill.agent.address, "", 256, b"h", [39], 3)
    kinds = {type(prefill.next_event()), type(prefill.next_event())}
    assert kinds == {Received, SendEnded}
    assert np.array_equal(prefill.pages[39], prefill.pages[0])


def test_nobody_listening_is_a_retryable_failure_within_the_connect_deadline(sides):
    _, decode = sides
    decode.agent.open_receive("nobody", "127.0.0.1:9", "", 10, b"h", [0], 0)
    failed = decode.next_event()
    assert isinstance(failed, ReceiveFailed)
    assert failed.retryable
    assert "127.0.0.1:9" in failed.message
    assert decode.next_event() == Quiet("nobody")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("", "a:1", "", 10, b"", [0], 0), "transfer id of 0 characters"),
        (("x", "a:1", "", 0, b"", [], 0), "0 tokens"),
        (("x", "a:1", "", 257, b"", [0], 0), "1 pages for 257 tokens"),
        (("x", "a:1", "", 257, b"", [0, 0], 0), "given twice"),
        (("x", "a:1", "", 10, b"", [COUNT], 0), f"record {COUNT} of"),
        (("x", "a:1", "", 10, b"", [0], 4), "record 4 of"),
    ],
)
def test_a_receive_that_cannot_be_is_refused_at_the_call(sides, arguments, complaint):
    _, decode = sides
    with pytest.raises(ValueError, match=complaint):
        decode.agent.open_receive(*arguments)
    decode.agent.check_integrity()


def test_publishing_more_or_fewer_pages_than_the_prompt_has_is_refused_at_the_call(sides):
    prefill, _ = sides
    prefill.agent.open_send("wrong", 600, b"h")
    with pytest.raises(ValueError, match="already being sent"):
        prefill.agent.open_send("wrong", 600, b"h")
    with pytest.raises(ValueError, match="4 more pages after 0 of 3"):
        prefill.agent.publish_pages("wrong", [0, 1, 2, 3])
    prefill.agent.publish_pages("wrong", [0])
    with pytest.raises(ValueError, match="1 more pages after 1 of 3"):
        prefill.agent.publish_ready("wrong", [1], 0, b"")
    prefill.agent.cancel_send("wrong", "test")
    assert prefill.next_event() == SendEnded("wrong", "failed")
    prefill.agent.publish_pages("wrong", [1])  # too late, ignored
    prefill.agent.check_integrity()


def test_an_agent_whose_thread_died_says_so_at_every_poll():
    side = Side(3)
    side.agent._call(side.agent._core._tasks.create_task, _die())
    side.agent._thread.join(10.0)
    for _ in range(2):
        with pytest.raises(TransferError, match="lost device"):
            side.agent.poll()
    with pytest.raises(TransferError, match="has stopped"):
        side.agent.release("x")
    side.agent.stop()


async def _die() -> None:
    raise RuntimeError("lost device")
