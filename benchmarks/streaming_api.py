"""How many streams one API process carries.

    python -m benchmarks.streaming_api [--streams 512,768,...] [--period-ms 20] [--seconds 8] [--path chat|completions]

An engine process without a model sends one token for each stream every period, in one message over the same channel
that real engines use. The API process detokenises, parses, and writes one server-sent event per token; a client reads
all streams and measures how long each token took from the engine's send to the client's receive. The API process runs
on one core of its own where there is more than one; client and engine share the others. With the default list the last
rows find the ceiling: a row "keeps up" when all tokens arrived in time and p99 is under one period. Rows of "bare" are
the peer: a process that only writes the same bytes to as many streams, so all that it costs is event loop and kernel.
`user_us` and `kernel_us` are processor time per token.
"""

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import orjson
import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry

from api.app import build_app
from api.backend import EngineInfo
from api.settings import ApiSettings
from api.tokenizer import Tokenizer
from benchmarks import bare_streams
from benchmarks.paced_engine import MAX_MODEL_LEN, Pace, added_ms, run, timing_tokenizer
from node.engine_client import NodeEngineClient
from node.engine_process import EngineProcess
from runtime.channel import ChannelAddress

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "none"},
    "/v1/completions": {"prompt": "hi"},
}


def cores() -> tuple[set[int], set[int]]:
    """The core of the API process, and those of everything else."""
    usable = sorted(os.sched_getaffinity(0))
    return {usable[0]}, set(usable[1:]) or {usable[0]}


def serve(
    address_of: Connection,
    period_s: float,
    max_model_len: int = MAX_MODEL_LEN,
    checkpoint: str | None = None,
    one_core: bool = False,
) -> None:
    """The API process: tells its port, serves until its parent goes. `checkpoint`: the folder of another tokenizer."""
    uvloop.run(_serve(address_of, period_s, max_model_len, checkpoint, one_core))


async def _serve(
    address_of: Connection, period_s: float, max_model_len: int, checkpoint: str | None, one_core: bool
) -> None:
    tokenizer = timing_tokenizer() if checkpoint is None else Tokenizer.load(Path(checkpoint))
    first_time_id = tokenizer.token_id("0000")
    pace = Pace(period_s, tokenizer.encode("a")[0], 1) if first_time_id is None else Pace(period_s, first_time_id)
    info = EngineInfo(model_id="paced", max_model_len=max_model_len, vocab_size=tokenizer.vocab_size, role="standalone")
    api_cores, other_cores = cores()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as directory:
        engine = EngineProcess("paced", ChannelAddress(directory, 0), run, pace)
        if one_core:
            os.sched_setaffinity(0, other_cores)
        engine.start()
        try:
            await engine.wait_ready(30.0)
            if one_core:
                os.sched_setaffinity(0, api_cores)
            client = NodeEngineClient(info, [engine], lambda _: None, recompute=False)
            settings = ApiSettings(max_concurrent_requests=1 << 20)
            runner = web.AppRunner(
                build_app(client, tokenizer, settings, CollectorRegistry()), access_log=None, shutdown_timeout=0.1
            )
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
            address_of.send(runner.addresses[0][:2])
            await asyncio.to_thread(address_of.poll, None)
            await runner.cleanup()
        finally:
            await engine.stop(2.0)


class StreamReader(asyncio.Protocol):
    """One request, and the delay of every token that comes back."""

    def __init__(self, request: bytes, key: bytes, delays_ms: list[float], ended: "asyncio.Future[None]") -> None:
        self._request = request
        self._key = key
        self._delays_ms = delays_ms
        self._ended = ended
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's transports have a base of their own

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self._tail + data
        at = 0
        while (found := data.find(self._key, at)) >= 0 and len(data) >= found + len(self._key) + 4:
            at = found + len(self._key) + 4
            text = data[at - 4 : at]
            if text.isdigit():
                self._delays_ms.append(added_ms(text, now))
        self._tail = data[max(at, len(data) - 400) :]

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def cpu_s(pid: int) -> tuple[float, float]:
    """Processor seconds a process has used: its own, and the kernel's for it."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks_per_s, int(fields[12]) / ticks_per_s


async def measure(address: tuple[str, int], pid: int, path: str, num_streams: int, num_tokens: int) -> dict[str, float]:
    """One row: all streams at once, from their start to their end.

    Times and costs are those of the steady part: every stream has begun and none has ended.
    """
    loop = asyncio.get_running_loop()
    body = orjson.dumps({**BODIES[path], "stream": True, "max_tokens": num_tokens})
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    key = b'"content":"' if "chat" in path else b'"text":"'
    delays_ms: list[list[float]] = [[] for _ in range(num_streams)]
    ends = [loop.create_future() for _ in range(num_streams)]
    for delays, end in zip(delays_ms, ends, strict=True):
        await loop.create_connection(partial(StreamReader, request, key, delays, end), *address)
    async with asyncio.timeout(300):
        while not all(delays_ms):  # noqa: ASYNC110 (an event per stream would cost the streams more)
            await asyncio.sleep(0.02)
        begun, first, early = time.monotonic(), cpu_s(pid), [len(delays) for delays in delays_ms]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        took_s, last, late = time.monotonic() - begun, cpu_s(pid), [len(delays) for delays in delays_ms]
        await asyncio.gather(*ends)
    steady = sorted(
        delay for delays, start, end in zip(delays_ms, early, late, strict=True) for delay in delays[start:end]
    )
    user_s, kernel_s = last[0] - first[0], last[1] - first[1]
    return {
        "streams": num_streams,
        "lost": num_streams * num_tokens - sum(map(len, delays_ms)),
        "tokens_per_s": len(steady) / took_s,
        "core": (user_s + kernel_s) / took_s,
        "user_us": 1e6 * user_s / len(steady),
        "kernel_us": 1e6 * kernel_s / len(steady),
        "p50_ms": steady[len(steady) // 2],
        "p99_ms": steady[len(steady) * 99 // 100],
        "max_ms": steady[-1],
    }


@contextmanager
def process(target: Callable[..., None], *args: Any, **options: Any) -> Iterator[tuple[tuple[str, int], int]]:
    """A server in a process of its own, from its start to its end: its address and pid."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=target, args=(theirs, *args), kwargs=options)
    server.start()
    theirs.close()
    try:
        address = ours.recv()
        assert server.pid is not None
        yield address[:2], server.pid
    finally:
        ours.close()
        server.join(10)


COLUMNS = {
    "streams": "8.0f",
    "tokens_per_s": "13.0f",
    "lost": "5.0f",
    "core": "5.0%",
    "user_us": "8.1f",
    "kernel_us": "10.1f",
    "p50_ms": "7.2f",
    "p99_ms": "7.2f",
    "max_ms": "7.2f",
}


def show(name: str, row: dict[str, float], period_ms: float) -> None:
    asked = row["streams"] * 1000 / period_ms
    keeps_up = row["lost"] == 0 and row["p99_ms"] < period_ms and row["tokens_per_s"] > 0.9 * asked
    cells = [f"{row[column]:{form}}" for column, form in COLUMNS.items()]
    print(f"{name:>5} {' '.join(cells)}  {'yes' if keeps_up else 'no'}", flush=True)


async def main(options: argparse.Namespace) -> None:
    path = "/v1/chat/completions" if options.path == "chat" else "/v1/completions"
    period_s = options.period_ms / 1000
    num_tokens = int(options.seconds / period_s)
    print(f"{path}, one token per stream every {options.period_ms:g} ms, {num_tokens} tokens a stream, one core")
    heads = [f"{column:>{len(f'{0:{form}}')}}" for column, form in COLUMNS.items()]
    print(f"{'':>5} {' '.join(heads)}  keeps up")
    api_cores, other_cores = cores()
    os.sched_setaffinity(0, api_cores)
    with process(bare_streams.serve, period_s, num_tokens) as (address, pid):
        os.sched_setaffinity(0, other_cores)
        for num_streams in options.bare:
            show(
                "bare", await measure(address, pid, "/v1/chat/completions", num_streams, num_tokens), options.period_ms
            )
    with process(serve, period_s, one_core=True) as (address, pid):
        await measure(address, pid, path, 8, 20)
        for num_streams in options.streams:
            show("api", await measure(address, pid, path, num_streams, num_tokens), options.period_ms)


def _counts(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming_api", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--streams", type=_counts, default="256,512,640,768,896,1024")
    parser.add_argument("--bare", type=_counts, default="512", help="numbers of streams for the peer")
    parser.add_argument("--period-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--path", choices=("chat", "completions"), default="chat")
    return parser.parse_args()


if __name__ == "__main__":
    uvloop.run(main(options()))
