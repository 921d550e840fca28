"""Lanes between two ends in one loop, and against connections that do not keep the rules."""

import asyncio
import contextlib
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.lane import Lane, LaneError, Lanes, open_lane
from runtime.errors import ConfigError
from runtime.grpc import MAX_MESSAGE_BYTES

HOST, PORTS = "127.0.0.1", (15000, 17000)


@pytest.fixture
async def lanes():
    lanes = Lanes(None, patience_s=0.2)
    await lanes.start(HOST, PORTS)
    yield lanes
    lanes.close()


async def both_ends(lanes: Lanes) -> tuple[Lane, Lane]:
    """(the prefill end, the decode end)"""
    with lanes.expect() as (key, coming):
        theirs = await open_lane(HOST, lanes.port, key, None)
        return await asyncio.wait_for(coming, 5), theirs


async def is_over(lane: Lane) -> None:
    await asyncio.wait_for(lane.over.wait(), 5)


class Ether(asyncio.Transport):
    """Keeps what is written, and ends at once when it is aborted."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.aborted = False

    def get_extra_info(self, name, default=None):
        return socket.socket()

    def is_closing(self) -> bool:
        return self.aborted

    def write(self, data) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


def lane_over_ether() -> tuple[Lane, Ether]:
    lane, ether = Lane(), Ether()
    lane.connection_made(ether)
    return lane, ether


@given(st.lists(st.binary(max_size=300), max_size=6), st.lists(st.integers(1, 400), max_size=20), st.booleans())
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(messages, cuts, listens_first):
    speaker, ether = lane_over_ether()
    for message in messages:
        speaker.send(message)
    listener, _ = lane_over_ether()
    heard: list[bytes] = []
    if listens_first:
        listener.listen(heard.append)
    rest = bytes(ether.written)
    for size in [*cuts, len(rest)]:
        listener.data_received(rest[:size])
        rest = rest[size:]
    assert listens_first or heard == []
    listener.listen(heard.append)
    assert heard == messages


def test_a_message_of_impossible_size_ends_the_lane_before_it_is_stored():
    lane, ether = lane_over_ether()
    lane.listen(lambda message: None)
    lane.data_received((MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"))
    assert ether.aborted
    assert isinstance(lane.failure, LaneError)


def test_a_message_that_cannot_be_handled_ends_the_lane_and_nothing_after_it_is_heard():
    lane, ether = lane_over_ether()
    heard = []

    def refuse(message: bytes) -> None:
        heard.append(message)
        raise ValueError("nonsense")

    lane.send(b"one")
    lane.send(b"two")
    lane.listen(refuse)
    lane.data_received(bytes(ether.written))
    assert (heard, ether.aborted) == ([b"one"], True)
    assert str(lane.failure) == "nonsense"
    lane.send(b"too late")
    assert b"too late" not in ether.written


async def test_what_is_said_at_once_waits_for_the_listener_and_is_heard_before_the_end(lanes):
    with lanes.expect() as (key, coming):
        decode = await open_lane(HOST, lanes.port, key, None)
        decode.send(b"claim")
        decode.send(bytes(200_000))
        decode.close()
        prefill = await asyncio.wait_for(coming, 5)
    heard: list[bytes] = []
    prefill.listen(heard.append)
    await is_over(prefill)
    await is_over(decode)
    assert heard == [b"claim", bytes(200_000)]
    assert prefill.failure is None


async def test_both_directions_are_open(lanes):
    prefill, decode = await both_ends(lanes)
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    prefill.listen(lambda message: prefill.send(message + b"!"))
    decode.listen(heard.put_nowait)
    for n in range(100):
        decode.send(str(n).encode())
    assert [await asyncio.wait_for(heard.get(), 5) for _ in range(100)] == [f"{n}!".encode() for n in range(100)]
    prefill.close()
    await is_over(decode)


async def test_a_key_is_good_for_one_connection_while_it_is_expected(lanes):
    with lanes.expect() as (key, coming):
        first = await open_lane(HOST, lanes.port, key, None)
        await asyncio.wait_for(coming, 5)
        second = await open_lane(HOST, lanes.port, key, None)
        await is_over(second)
        assert not first.over.is_set()
    with lanes.expect() as (key, _):
        pass
    late = await open_lane(HOST, lanes.port, key, None)
    await is_over(late)


@pytest.mark.parametrize("said", [b"", b"\x10\0", b"\x10\0\0\0" + bytes(16), b"GET / HTTP/1.1\r\n\r\n"])
async def test_strangers_are_sent_away(lanes, said):
    with lanes.expect() as (_, coming):
        reader, writer = await asyncio.open_connection(HOST, lanes.port)
        writer.write(said)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert not coming.done()


async def test_no_free_port_is_said_with_the_range():
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"no port of {port}-{port} on {HOST} is free for lanes"):
            await Lanes(None, 0.2).start(HOST, (port, port))
