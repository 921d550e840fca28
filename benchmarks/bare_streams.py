"""The least that streaming can cost: a uvloop process that does nothing but write one token's bytes to every stream.

It answers the same client as the API process does and writes chunks of the same form and size, on a timer of its own:
no engine, no HTTP parsing, no tokenizer. What it costs a token is the kernel's and the event loop's share, on this
machine and at this moment.
"""

import asyncio
import os
import time
from multiprocessing.connection import Connection
from typing import cast

import uvloop

from benchmarks.paced_engine import TICKS_PER_S

CHUNK = (
    b'data: {"id":"chatcmpl-00000000000000000000000000000000","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"paced","choices":[{"index":0,"delta":{"content":"%04d"},"logprobs":null,"finish_reason":null}]}\n\n'
)


class _Stream(asyncio.Protocol):
    """Gets `num_tokens` chunks from its first byte on, then the end of the connection."""

    def __init__(self, running: "dict[_Stream, int]", num_tokens: int) -> None:
        self._running = running
        self._num_tokens = num_tokens

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._running.setdefault(self, self._num_tokens)

    def connection_lost(self, error: Exception | None) -> None:
        self._running.pop(self, None)


async def _serve(address_of: Connection, period_s: float, num_tokens: int) -> None:
    loop = asyncio.get_running_loop()
    running: dict[_Stream, int] = {}
    server = await loop.create_server(lambda: _Stream(running, num_tokens), "127.0.0.1", 0, backlog=4096)
    address_of.send((server.sockets[0].getsockname(), [os.getpid()]))
    parent = asyncio.create_task(asyncio.to_thread(address_of.poll, None))
    due = time.monotonic()
    while not parent.done():
        due = max(due + period_s, time.monotonic())
        data = CHUNK % (int(time.monotonic() * TICKS_PER_S) % TICKS_PER_S)
        data = b"%x\r\n%b\r\n" % (len(data), data)
        for stream, left in list(running.items()):
            stream.transport.write(data)
            running[stream] = left - 1
            if left == 1:
                del running[stream]
                stream.transport.close()
        await asyncio.sleep(due - time.monotonic())
    server.close()


def serve(address_of: Connection, period_s: float, num_tokens: int) -> None:
    """The process: tells its port, serves until its parent goes."""
    uvloop.run(_serve(address_of, period_s, num_tokens))
