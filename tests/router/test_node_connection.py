"""A node's bytes on their way to a client: the short way for whole events gives what the long way gives."""

import asyncio
import socket

from hypothesis import given
from hypothesis import strategies as st

from router.exchange import HIGH_WATER_BYTES, ConnectionBroken, Exchange
from router.http1 import ResponseParser
from router.node_connection import NodeConnection

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class Wire(asyncio.Transport):
    """The node's side of a connection."""

    def __init__(self) -> None:
        super().__init__({"socket": self})
        self.closed = self.paused = False
        self.options: list[tuple[int, int, int]] = []

    def setsockopt(self, *option):
        self.options.append(option)

    def writelines(self, parts):
        pass

    def is_closing(self):
        return self.closed

    def abort(self):
        self.closed = True

    def get_write_buffer_size(self):
        return 0

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False


class Origin:
    """What a connection and an exchange want of theirs."""

    name = "node:1"

    def __init__(self) -> None:
        self.time = 0.0
        self.given_back = 0

    def now(self) -> float:
        return self.time

    def forget(self, exchange):
        pass

    def lost(self, connection):
        pass

    def give_back(self, connection):
        self.given_back += 1


class Client:
    """What a client gets, and whether it takes anything now."""

    def __init__(self) -> None:
        self.wire = b""
        self.takes = True
        self.calls: list[str] = []

    def relay(self, data: bytes) -> bool:
        self.calls.append("relay")
        if self.takes:
            self.wire += b"%x\r\n%b\r\n" % (len(data), data)
        return self.takes

    def write_chunk(self, data: bytes) -> bool:
        self.calls.append("chunk")
        if self.takes:
            self.wire += data
        return self.takes

    def take_what_waits(self, exchange: Exchange) -> None:
        """As the request's task does when it is woken."""
        if data := exchange.take():
            self.wire += b"%x\r\n%b\r\n" % (len(data), data)

    @property
    def body(self) -> bytes:
        parser = ResponseParser()
        body = b"".join(parser.feed(HEAD + self.wire))
        assert not parser.notes, "a note left the router"
        return body


def stream(client: Client) -> tuple[Origin, NodeConnection, Exchange]:
    """An exchange whose head and first event are with the client."""
    origin = Origin()
    connection = NodeConnection(origin)
    connection.connection_made(Wire())
    exchange = Exchange(origin, lambda: None)
    connection.start(exchange, [b"request"])
    exchange.relay_to(client.relay, client.write_chunk)
    connection.data_received(HEAD + chunk(b"data: first\n\n"))
    client.calls.clear()
    return origin, connection, exchange


def chunk(data: bytes, note: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), note, data)


events = st.binary(max_size=40).map(lambda text: b"data: " + text + b"\n\n")
notes = st.sampled_from([b"", b";t=1", b";t=12.7", b";t=1;end", b";"])
chunks = st.tuples(st.one_of(events, st.binary(min_size=1, max_size=40)), notes).map(lambda pair: chunk(*pair))


@given(st.lists(st.lists(chunks, min_size=1, max_size=3).map(b"".join), max_size=12), st.data())
def test_whatever_comes_and_however_it_is_cut_the_client_gets_the_body_and_no_note(reads, data):
    client = Client()
    _, connection, exchange = stream(client)
    expected = ResponseParser()
    body = b"".join(expected.feed(HEAD + chunk(b"data: first\n\n") + b"".join(reads)))
    for read in reads:
        cut = data.draw(st.integers(0, len(read)))
        for part in (read[:cut], read[cut:]):
            client.takes = data.draw(st.booleans())
            if part:
                connection.data_received(part)
            if data.draw(st.booleans()):
                client.take_what_waits(exchange)
    client.take_what_waits(exchange)
    assert client.body == body
    assert bytes(exchange.notes) == bytes(expected.notes)
    connection.data_received(END)
    assert exchange.complete


def test_events_that_come_one_by_one_take_the_short_way_and_keep_their_framing():
    client = Client()
    _, connection, exchange = stream(client)
    for number in range(20):
        connection.data_received(chunk(b"data: %d\n\n" % number, b";t=%d" % number))
    connection.data_received(chunk(b"data: plain\n\n"))
    assert client.calls == ["chunk"] * 21
    assert client.wire.endswith(b"a\r\ndata: 19\n\n\r\n" + chunk(b"data: plain\n\n"))
    assert bytes(exchange.notes) == b"".join(b";t=%d" % number for number in range(20))


def test_events_that_come_together_go_out_as_one_chunk():
    client = Client()
    _, connection, exchange = stream(client)
    connection.data_received(b"".join(chunk(b"data: %d\n\n" % number, b";t=%d" % number) for number in range(3)))
    assert client.calls == ["chunk"]
    assert client.wire.endswith(chunk(b"data: 0\n\ndata: 1\n\ndata: 2\n\n"))
    assert bytes(exchange.notes) == b";t=0;t=1;t=2"


def test_acknowledgements_are_lazy_on_streams_only():
    origin, wire = Origin(), Wire()
    connection = NodeConnection(origin)
    connection.connection_made(wire)
    exchange = Exchange(origin, lambda: None)
    connection.start(exchange, [b"request"])
    assert wire.options == []
    exchange.relay_to(Client().relay, None)
    assert wire.options == [(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)]


def test_it_is_open_again_after_anything_else():
    client = Client()
    _, connection, _ = stream(client)
    event = chunk(b"data: x\n\n")
    for odd in (event + event[:5], event[:5], b"C\r\ndata: 12345\n\r\n", event.replace(b"\r\n", b" \r\n", 1)):
        connection.data_received(odd)
        if odd.endswith(event[:5]):
            connection.data_received(event[5:])
        client.calls.clear()
        connection.data_received(event)
        assert client.calls == ["chunk"]


def test_what_is_not_exactly_one_chunk_in_plain_hex_is_left_to_the_parser():
    for data in (
        b"+9\r\ndata: x\n\n\r\n", b"0x9\r\ndata: x\n\n\r\n", b"-2;\n\n\r\n", b"-2\r\n\n\n\r\n",
        b"1_0\r\ndata: xxxxxxx\n\n\r\n", b" 9\r\ndata: x\n\n\r\n", b"\n\n\r\n", b"a\r\ndata: x\n\n\r\n",
    ):  # fmt: skip
        client = Client()
        _, connection, exchange = stream(client)
        before = client.wire
        connection.data_received(data)
        connection.data_received(b"XX")
        assert "chunk" not in client.calls
        assert isinstance(exchange.error, ConnectionBroken), data
        assert b"-" not in client.wire[len(before) :]


def test_a_client_that_takes_nothing_makes_events_wait_in_order_and_the_node_stop():
    client = Client()
    _, connection, exchange = stream(client)
    client.takes = False
    event = b"data: " + b"x" * 5000 + b"\n\n"
    while not connection._transport.paused:
        connection.data_received(chunk(event, b";t=1"))
    assert exchange._size > HIGH_WATER_BYTES
    client.takes = True
    client.calls.clear()
    connection.data_received(chunk(b"data: last\n\n"))
    assert client.calls == [], "nothing may overtake what waits"
    client.take_what_waits(exchange)
    assert not connection._transport.paused
    assert client.body.endswith(event + b"data: last\n\n")
    assert exchange.notes.count(b";t=1") * len(event) == client.body.count(b"x") + 8 * exchange.notes.count(b";t=1")


def test_a_note_is_kept_only_of_what_went_out():
    client = Client()
    _, connection, exchange = stream(client)
    client.takes = False
    connection.data_received(chunk(b"data: x\n\n", b";t=5"))
    assert bytes(exchange.notes) == b";t=5", "it waits here, and goes out before the stream is given up"
    assert exchange.take() == b"data: x\n\n"


def test_events_on_the_short_way_are_heard_when_deadlines_are_looked_at():
    client = Client()
    origin, connection, exchange = stream(client)
    assert exchange.heard_at == 0.0
    origin.time = 50.0
    exchange.heard(50.0)
    assert exchange.heard_at == 0.0
    connection.data_received(chunk(b"data: x\n\n"))
    exchange.heard(50.1)
    assert exchange.heard_at == 50.1
    exchange.heard(60.0)
    assert exchange.heard_at == 50.1


def test_the_short_way_ends_with_the_exchange():
    client = Client()
    _, connection, exchange = stream(client)
    exchange.close()
    client.calls.clear()
    connection.data_received(chunk(b"data: x\n\n"))
    assert client.calls == []
    client = Client()
    origin, connection, exchange = stream(client)
    connection.data_received(END)
    assert exchange.complete
    assert origin.given_back == 1
    client.calls.clear()
    connection.data_received(chunk(b"data: x\n\n"))
    assert client.calls == []
    assert connection._transport.closed, "bytes nobody asked for"
