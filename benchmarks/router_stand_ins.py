"""Nodes that cost as little as possible, for benchmarks of what stands in front of them.

One process, three ports: a prefill node, a decode node, and the bootstrap server that vllm-router asks. A prefill
answers after `prefill_s`; a decode answers once the prefill of the same transfer has, so that the order of the legs
matters as it does in earnest. What a request wants is written in its `user` field: "json", or "sse <events> <gap in
microseconds>". Each event carries the time it was sent (CLOCK_MONOTONIC, ns), and a note of its token where a router
asks for notes (`api.resume`).
"""

import argparse
import asyncio
import json
import os
import re
import sys
import time
from collections import deque

from router.http1 import parse_header_lines

_TRANSFER = re.compile(rb'"transfer_id": ?"([^"]+)"')
_WANTED = re.compile(rb'"user": ?"(json|sse) ?(\d*) ?(\d*)"')
_JSON = {
    "/health": b"{}",
    "/v1/models": b'{"object":"list","data":[{"id":"m","object":"model"}]}',
    "/cluster/ranks": b"[]",
}
_USAGE = b'"usage":{"prompt_tokens":7,"completion_tokens":1,"total_tokens":8}'
_ANSWER = (
    b'{"id":"x","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"hi"}],%b}' % _USAGE
)


class Nodes:
    """What both nodes share."""

    def __init__(self, ranks: int, prefill_s: float) -> None:
        self.ranks = ranks
        self.prefill_s = prefill_s
        self.done: dict[bytes, asyncio.Future[None]] = {}
        self.loop = asyncio.get_running_loop()
        self.ports: dict[str, int] = {}
        self._pacers: dict[float, Pacer] = {}

    def pacer(self, gap_s: float) -> "Pacer":
        return self._pacers.setdefault(gap_s, Pacer(self.loop, gap_s))

    def computed(self, transfer: bytes) -> asyncio.Future[None]:
        future = self.done.get(transfer)
        if future is None:
            future = self.done[transfer] = self.loop.create_future()
            # Forgotten later: every transfer is asked for once on each side.
            self.loop.call_later(30.0, self.done.pop, transfer, None)
        return future

    def describe(self, role: str) -> bytes:
        ranks = [
            {"rank": rank, "epoch": f"{rank:032x}", "handoff_address": f"127.0.0.1:{1000 + rank}"}
            for rank in range(self.ranks)
        ]
        join = {"node_id": role, "role": role.upper(), "http_url": "http://x:1", "model_id": "m", "ranks": ranks}
        return json.dumps(join).encode()


class Pacer:
    """Streams of one gap, in the order in which their next events are due: one timer for all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, gap_s: float) -> None:
        self._loop = loop
        self._gap_s = gap_s
        self._due: deque[tuple[float, Connection, int]] = deque()

    def add(self, stream: "Connection", count: int) -> None:
        """`count` events from now on."""
        stream.event()
        self._put(self._loop.time() + self._gap_s, stream, count - 1)

    def _put(self, due: float, stream: "Connection", left: int) -> None:
        self._due.append((due, stream, left))
        if len(self._due) == 1:
            self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        while self._due and self._due[0][0] <= now:
            due, stream, left = self._due.popleft()
            if left and stream.transport is not None:
                stream.event()
                self._due.append((due + self._gap_s, stream, left - 1))
            else:
                stream.finish()
        if self._due:
            self._loop.call_at(self._due[0][0], self._tick)


class Connection(asyncio.Protocol):
    """One connection from a router, one request at a time."""

    def __init__(self, nodes: Nodes, role: str) -> None:
        self.nodes = nodes
        self.role = role
        self.buffer = b""
        self.note = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        line, *lines = self.buffer[:end].split(b"\r\n")
        headers = dict(parse_header_lines(lines))
        length = int(headers.get(b"content-length", b"0"))
        self.note = b";t=12345" if b"x-tandem-resumable" in headers else b""
        if len(self.buffer) < end + 4 + length:
            return
        body = self.buffer[end + 4 : end + 4 + length]
        self.buffer = self.buffer[end + 4 + length :]
        self.request(line.split(b" ")[1].decode(), body)

    def request(self, path: str, body: bytes) -> None:
        nodes = self.nodes
        if not path.startswith("/v1/c"):
            self.answer(self.side_answer(path))
            return
        found = _TRANSFER.search(body)
        transfer = found[1] if found else b""
        if b'"do_remote_decode":true' in body.replace(b" ", b"")[-400:] or self.role == "prefill":
            if nodes.prefill_s:
                nodes.loop.call_later(nodes.prefill_s, self.prefilled, transfer)
            else:
                self.prefilled(transfer)
            return
        computed = nodes.computed(transfer) if transfer and nodes.prefill_s else None
        if computed is None or computed.done():
            self.decode(body)
        else:
            computed.add_done_callback(lambda _: self.decode(body))

    def prefilled(self, transfer: bytes) -> None:
        if self.nodes.prefill_s:
            computed = self.nodes.computed(transfer)
            if not computed.done():
                computed.set_result(None)
        self.answer(_ANSWER)

    def decode(self, body: bytes) -> None:
        wanted = _WANTED.search(body)
        if wanted is None or wanted[1] == b"json":
            self.answer(_ANSWER)
            return
        self.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        count, gap_us = int(wanted[2]), int(wanted[3])
        if gap_us:
            self.nodes.pacer(gap_us * 1e-6).add(self, count)
            return
        for _ in range(count):
            self.event()
        self.finish()

    def event(self) -> None:
        text = b'data: {"t":%d,"id":"x","object":"text_completion","choices":[{"index":0,"text":" token"}]}\n\n' % (
            time.monotonic_ns()
        )
        data = b"%x%b\r\n%b\r\n" % (len(text), self.note, text)
        transport = self.transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size():
            self.write(data)
            return
        # The event loop would send only after all events of this moment have been made.
        try:
            sent = os.write(transport.get_extra_info("socket").fileno(), data)
        except OSError:
            sent = 0
        if sent < len(data):
            self.write(data[sent:])

    def finish(self) -> None:
        text = b'data: {"id":"x","choices":[],%b}\n\ndata: [DONE]\n\n' % _USAGE
        self.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text))

    def side_answer(self, path: str) -> bytes:
        if path == "/cluster/node":
            return self.nodes.describe(self.role)
        if path == "/query":
            return json.dumps(
                {str(rank): {"engine_id": f"e{rank}", "worker_addr": {}} for rank in range(self.nodes.ranks)}
            ).encode()
        if path == "/metrics":
            return b"".join(b'vllm:num_requests_running{engine="%d"} 0\n' % rank for rank in range(self.nodes.ranks))
        return _JSON.get(path, b"{}")

    def answer(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.write(head + body)

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)


async def serve(ranks: int, prefill_s: float) -> None:
    """Print the three ports as JSON, then serve until stdin closes."""
    nodes = Nodes(ranks, prefill_s)
    loop = asyncio.get_running_loop()
    for role in ("prefill", "decode", "bootstrap"):
        server = await loop.create_server(lambda role=role: Connection(nodes, role), "127.0.0.1", 0, backlog=2048)  # type: ignore[misc]
        nodes.ports[role] = server.sockets[0].getsockname()[1]
    print(json.dumps(nodes.ports), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_stand_ins", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--prefill-s", type=float, default=0.0)
    options = parser.parse_args()
    uvloop.run(serve(options.ranks, options.prefill_s))


if __name__ == "__main__":
    main()
