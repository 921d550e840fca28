"""Raw bytes at the door: what the fast path serves, what aiohttp gets, and that neither breaks the connection."""

import asyncio
import json
import re

import pytest

from tests.router.harness import Cluster, cluster, pairs_of, settings
from tests.router.stand_in_nodes import Fault

BODY = json.dumps({"prompt": "a b", "max_tokens": 2}).encode()
STREAM = json.dumps({"prompt": "a b", "max_tokens": 2, "stream": True}).encode()


def post(body: bytes = BODY, path: str = "/v1/completions", headers: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n{headers}\r\n".encode() + body


class Wire:
    """A connection of plain bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one answer off the wire."""
        async with asyncio.timeout(5.0):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status_line, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                assert headers["transfer-encoding"] == "chunked"
                body = b""
                while size := int(await self.reader.readline(), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                assert await self.reader.readline() == b"\r\n"
        return int(status_line.split(" ")[1]), headers, body


async def dial(it: Cluster) -> Wire:
    return Wire(*await asyncio.open_connection("127.0.0.1", it.service.port))


async def test_many_requests_share_one_connection_whatever_serves_them():
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        for request, expected in (
            (post(), b"w0 w1 "),
            (post(STREAM), b"[DONE]"),
            (post(BODY, "/v1/chat/completions?x=1"), b"w0 w1 "),
            (b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n", b"OK"),
            (post(), b"w0 w1 "),
            (post(STREAM), b"[DONE]"),
        ):
            wire.writer.write(request)
            status, headers, body = await wire.answer()
            assert status == 200
            assert expected in body
            if b"liveness" not in request:
                assert headers["x-request-id"]
        await it.settle()


async def test_a_request_may_come_byte_by_byte():
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        for byte in post():
            wire.writer.write(bytes([byte]))
            await wire.writer.drain()
            await asyncio.sleep(0)
        assert (await wire.answer())[0] == 200


async def test_pipelined_requests_are_answered_in_order():
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        wire.writer.write(b"".join(post(headers=f"X-Request-Id: r{number}\r\n") for number in range(20)))
        ids = [(await wire.answer())[1]["x-request-id"] for _ in range(20)]
        assert ids == [f"r{number}" for number in range(20)]
        await it.settle()


@pytest.mark.parametrize(
    "request_bytes",
    [
        post().replace(b"HTTP/1.1", b"HTTP/1.0"),
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (len(BODY), BODY),
    ],
)
async def test_requests_in_unusual_form_are_served_all_the_same(request_bytes):
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        wire.writer.write(request_bytes)
        status, _, body = await wire.answer()
        assert status == 200
        assert b"w0 w1 " in body


async def test_a_client_that_waits_for_100_continue_gets_it():
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        wire.writer.write(post(b"", headers="Expect: 100-continue\r\n", length=len(BODY)))
        assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.writer.write(BODY)
        assert (await wire.answer())[0] == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 5\r\n\r\n{}{}{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length : 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n folded: x\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST /v1/completions\r\n\r\n",
        b"\x00\x01\x02\x03\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
)
async def test_malformed_requests_get_a_400_and_reach_no_node(request_bytes):
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        wire.writer.write(request_bytes)
        async with asyncio.timeout(5.0):
            data = await wire.reader.read(100)
        assert data.split(b" ")[1] in (b"400", b"431"), data
        assert not it.prefills[0].seen
        assert (await it.complete())[0] == 200


async def test_bytes_in_headers_go_through_unchanged_and_start_no_second_header():
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        wire.writer.write(post(headers="Authorization: Bearer caf\xe9\r\n").decode("utf-8").encode("latin-1"))
        assert (await wire.answer())[0] == 200
        assert it.decodes[0].seen[0][0]["authorization"].encode("utf-8", "surrogateescape") == b"Bearer caf\xe9"


async def test_connection_close_is_honoured():
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        wire.writer.write(post(headers="Connection: close\r\n"))
        assert (await wire.answer())[1]["connection"] == "close"
        assert await wire.reader.read() == b""


async def test_a_client_that_leaves_while_sending_its_body_leaves_nothing():
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        wire.writer.write(post(length=1000))
        await wire.writer.drain()
        wire.writer.close()
        await asyncio.sleep(0.05)
        assert not it.prefills[0].seen
        await it.settle()


async def test_a_client_that_dawdles_over_its_request_is_cut_off():
    async with cluster(pairs_of(1, 1), settings(server={"header_timeout_s": 0.5})) as it:
        wire = await dial(it)
        wire.writer.write(post(length=1000))
        async with asyncio.timeout(5.0):
            assert await wire.reader.read() == b""


async def test_a_stream_that_stalls_on_the_clients_side_is_given_up():
    async with cluster(pairs_of(1, 1), settings(server={"write_stall_s": 0.3})) as it:
        wire = await dial(it)
        body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 300_000}).encode()
        wire.writer.write(post(body))
        await wire.reader.readexactly(10)
        # Nothing is read from here on.
        wire.writer.transport.pause_reading()
        await it.until(lambda: it.decodes[0].cancelled == 1, within_s=15.0)
        await it.settle()
        wire.writer.close()


async def test_the_router_stops_with_idle_connections_open():
    async with cluster(pairs_of(1, 1)) as it:
        wire = await dial(it)
        wire.writer.write(post())
        await wire.answer()
        it.stopping.set()
        async with asyncio.timeout(5.0):
            assert await wire.reader.read() == b""


@pytest.mark.parametrize("fast", [True, False])
async def test_both_ways_in_answer_alike(fast):
    async with cluster(pairs_of(1, 2), settings(server={"fast_path": fast})) as it:
        assert (await it.complete(max_tokens=2))[1]["choices"][0]["text"] == "w0 w1 "
        status, data = await it.stream(max_tokens=3)
        assert (status, data.count(b'"text":"w')) == (200, 3)
        it.decodes[0].faults.append(Fault.CLOSE_IN_STREAM)
        it.decodes[1].faults.append(Fault.CLOSE_IN_STREAM)
        assert b"stream_broken" in (await it.stream(max_tokens=6))[1]
        asking = asyncio.create_task(it.stream(max_tokens=100_000))
        await it.until(lambda: it.service.transfers.finished >= 4)
        asking.cancel()
        await it.settle()


async def test_a_slow_reader_gets_every_event_once_and_in_order():
    """Writes go past the event loop's buffer while it is empty, and through it while the client does not keep up."""
    count = 20_000
    async with cluster(pairs_of(1, 1, notes=True)) as it:
        wire = await dial(it)
        wire.writer.write(post(json.dumps({"prompt": "a", "stream": True, "max_tokens": count}).encode()))
        await wire.reader.readuntil(b"\r\n\r\n")
        data = b""
        async with asyncio.timeout(60.0):
            while not data.endswith(b"\r\n0\r\n\r\n"):
                data += await wire.reader.read(65536)
                if len(data) % 7 == 0:
                    # The client stops reading now and then.
                    await asyncio.sleep(0.02)
        words = [int(word) for word in re.findall(rb'"text":"w(\d+) "', data)]
        assert words == list(range(count))
        wire.writer.close()
        await it.settle()


async def test_requests_that_come_all_at_once_are_all_served():
    async with cluster(pairs_of(1, 1)) as it:
        wires = [await dial(it) for _ in range(100)]
        for wire in wires:
            wire.writer.write(post())
        answers = await asyncio.gather(*(wire.answer() for wire in wires[10:]))
        for wire in wires[:10]:
            wire.writer.close()
        assert [(status, b"w0 w1 " in body) for status, _, body in answers] == [(200, True)] * 90
        await it.settle()


async def test_a_request_whose_turn_never_comes_leaves_nothing():
    async with cluster(pairs_of(1, 1)) as it:
        wires = [await dial(it) for _ in range(50)]
        for wire in wires:
            wire.writer.write(post())
            wire.writer.transport.abort()
        await it.settle()
        assert (await it.complete())[0] == 200
