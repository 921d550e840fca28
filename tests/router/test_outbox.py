"""What is gathered for clients goes out within the turn of the event loop, in order, and never more of it than fits."""

import asyncio
import socket

from router.front import ClientConnection
from router.outbox import MOST, Outbox


class Writer:
    def __init__(self) -> None:
        self.got: list[bytes] = []

    def write_out(self, data: bytes) -> None:
        self.got.append(data)


async def test_it_goes_out_at_the_end_of_the_turn_in_order():
    outbox, writer = Outbox(asyncio.get_running_loop()), Writer()
    for number in range(5):
        outbox.add(writer, b"%d" % number)
    assert writer.got == []
    await asyncio.sleep(0)
    assert writer.got == [b"0", b"1", b"2", b"3", b"4"]
    outbox.add(writer, b"5")
    await asyncio.sleep(0)
    assert writer.got[-1] == b"5"


async def test_a_full_one_goes_out_at_once():
    outbox, writer = Outbox(asyncio.get_running_loop()), Writer()
    for number in range(MOST + 1):
        outbox.add(writer, b"%d" % number)
    assert len(writer.got) == MOST
    await asyncio.sleep(0)
    assert writer.got == [b"%d" % number for number in range(MOST + 1)]


class Front:
    """What a connection wants of its front."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.outbox = Outbox(self.loop)
        self.connections: set[ClientConnection] = set()


async def connected() -> tuple[ClientConnection, socket.socket]:
    """A client's connection, and the client's own end of it."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    front = Front()
    _, connection = await front.loop.create_connection(lambda: ClientConnection(front), sock=ours)
    return connection, theirs


async def read_all(end: socket.socket, size: int) -> bytes:
    data = b""
    async with asyncio.timeout(5.0):
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(end, 1 << 16)
    return data


async def test_whatever_way_bytes_go_to_a_client_they_keep_their_order():
    connection, theirs = await connected()
    with theirs:
        expected = b""
        for number in range(200):
            # Much at once, so that the socket fills and the transport has to keep some of it.
            data = b"%06d" % number * 500
            if number % 3:
                taken = connection.write_now(data)
            else:
                connection.send(data)
                taken = True
            if number % 20 == 19:
                await asyncio.sleep(0)
            if not taken:
                break
            expected += data
        assert not taken, "a client that reads nothing is noticed"
        assert await read_all(theirs, len(expected)) == expected
        await asyncio.sleep(0.01)
        assert not connection.blocked
        assert connection.write_now(b"more")
        assert await read_all(theirs, 4) == b"more"
    connection.abort()


async def test_a_client_that_left_costs_nobody_else_anything():
    left, theirs = await connected()
    other, end = await connected()
    with end:
        theirs.close()
        outbox = left._front.outbox
        for _ in range(3):
            outbox.add(left, b"x" * 100)
            outbox.add(other, b"y")
            await asyncio.sleep(0.01)
        assert await read_all(end, 3) == b"yyy"
        assert left.blocked
        assert not left.write_now(b"x")
    other.abort()
