"""How many streams one API process carries.

    python -m benchmarks.streaming_api [--streams 512,768,...] [--period-ms 20] [--seconds 8]
                                        [--path chat|completions|messages] [--processes 1]

An engine process without a model sends one token for each stream every period, in one message over the same channel
that real engines use. The API process detokenises, parses, and writes one server-sent event per token; a client reads
all streams and measures how long each token took from the engine's send to the client's receive. The API process runs
on one core of its own where there is more than one; client and engine share the others. With the default list the last
rows find the ceiling: a row "keeps up" when all tokens arrived in time and p99 is under one period. Rows of "bare" are
the peer: a process that only writes the same bytes to as many streams, so all that it costs is event loop and kernel.
`user_us` and `kernel_us` are processor time per token. `stolen` is the part of the machine's time that its host gave to
others meanwhile: where it is more than a few percent, the tail is the host's.
"""

import argparse
import asyncio
import contextlib
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import orjson
import uvloop

from api.backend import EngineInfo
from api.settings import ApiSettings
from api.tokenizer import Tokenizer
from benchmarks import bare_streams
from benchmarks.paced_engine import MAX_MODEL_LEN, Pace, added_ms, run, timing_spec
from benchmarks.ports import free_port
from engine.config import EngineConfig
from node.api_process import api_processes
from node.config import NodeConfig
from node.engine_process import EngineProcess
from node.http_surface import HttpSurface, SurfaceSpec

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "none"},
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "thinking": {"type": "disabled"}},
}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "messages": "/v1/messages"}


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
    num_processes: int = 1,
) -> None:
    """A node without a model: tells its address and the pids of its API processes, serves until its parent goes.

    `checkpoint`: the folder of another tokenizer. `one_core`: the first API process has a core to itself.
    """
    uvloop.run(_serve(address_of, Pacing(period_s, max_model_len, checkpoint, one_core, num_processes)))


class Pacing(NamedTuple):
    period_s: float
    max_model_len: int
    checkpoint: str | None
    one_core: bool
    num_processes: int


async def _serve(address_of: Connection, pacing: Pacing) -> None:
    api_cores, other_cores = cores()
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-"))
        if pacing.checkpoint is None:
            (Path(directory) / "tokenizer.json").write_bytes(orjson.dumps(timing_spec()))
        tokenizer = Tokenizer.load(Path(pacing.checkpoint or directory))
        first_time_id = tokenizer.token_id("0000")
        pace = Pace(pacing.period_s, tokenizer.encode("a")[0], 1)
        if first_time_id is not None:
            pace = Pace(pacing.period_s, first_time_id)
        spec = SurfaceSpec(
            config=NodeConfig(
                port=free_port(),
                api_processes=pacing.num_processes,
                engine=EngineConfig(model=pacing.checkpoint or directory),
                api=ApiSettings(max_concurrent_requests=1 << 20),
            ),
            info=EngineInfo(
                model_id="paced",
                max_model_len=pacing.max_model_len,
                vocab_size=tokenizer.vocab_size,
                role="standalone",
            ),
            directory=directory,
        )
        if pacing.one_core:
            os.sched_setaffinity(0, other_cores)
        engine = EngineProcess("paced", spec.channel(0), run, pace)
        engine.start()
        stack.push_async_callback(engine.stop, 2.0)
        await engine.wait_ready(30.0)
        others = await stack.enter_async_context(api_processes(spec, 30.0))
        if pacing.one_core:
            os.sched_setaffinity(0, api_cores)
        surface = HttpSurface(spec, [engine], tokenizer)
        stack.push_async_callback(surface.close)
        await surface.prepare()
        await surface.open()
        for process in others:
            process.open()
        pids = [os.getpid(), *(process.pid for process in others)]
        address_of.send(((spec.config.host, spec.config.port), pids))
        await asyncio.to_thread(address_of.poll, None)


class StreamReader(asyncio.Protocol):
    """One request, and when which bytes of its answer came. They are read when all has ended: that costs more than
    taking them, and would make the client what is measured."""

    def __init__(self, request: bytes, ended: "asyncio.Future[None]") -> None:
        self._request = request
        self._ended = ended
        self.arrived: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's transports have a base of their own

    def data_received(self, data: bytes) -> None:
        self.arrived.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def last_holds(self, key: bytes) -> bool:
        """Whether what came last has a token in it."""
        return bool(self.arrived) and key in self.arrived[-1][1]

    def delays_ms(self, key: bytes) -> list[tuple[float, float]]:
        """(when it came, delay in milliseconds) of every token."""
        delays = []
        tail = b""
        for now, data in self.arrived:
            data = tail + data
            at = 0
            while (found := data.find(key, at)) >= 0 and (end := data.find(b'"', found + len(key))) >= 0:
                # Tokens that waited for a server which was late come as one text.
                places = range(found + len(key), end, 4)
                delays += [(now, added_ms(data[place : place + 4], now)) for place in places]
                at = end
            tail = data[max(at, len(data) - 400) :] if found < 0 else data[found:]
        return delays


def cpu_s(pids: Sequence[int]) -> tuple[float, float]:
    """Processor seconds that processes have used: their own, and the kernel's for them."""
    used = [_cpu_s_of(pid) for pid in pids]
    return sum(user for user, _ in used), sum(kernel for _, kernel in used)


def _cpu_s_of(pid: int) -> tuple[float, float]:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks_per_s, int(fields[12]) / ticks_per_s


def stolen_s() -> float:
    """Processor seconds that the host gave to others while this machine wanted them, all cores together."""
    with open("/proc/stat") as stat:
        return int(stat.readline().split()[8]) / os.sysconf("SC_CLK_TCK")


async def measure(
    address: tuple[str, int], pids: Sequence[int], path: str, num_streams: int, num_tokens: int
) -> dict[str, float]:
    """One row: all streams at once, from their start to their end.

    Times and costs are those of the steady part: every stream has begun and none has ended.
    """
    loop = asyncio.get_running_loop()
    body = orjson.dumps({**BODIES[path], "stream": True, "max_tokens": num_tokens})
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    key = b'"content":"' if "chat" in path else b'"text":"'
    ends = [loop.create_future() for _ in range(num_streams)]
    readers = [(await loop.create_connection(partial(StreamReader, request, end), *address))[1] for end in ends]
    async with asyncio.timeout(300):
        while not (all(reader.last_holds(key) for reader in readers) or ends[0].done()):  # noqa: ASYNC110 (an event per stream would cost the streams more)
            await asyncio.sleep(0.02)
        begun, first, stolen = time.monotonic(), cpu_s(pids), stolen_s()
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        ended, last, stolen = time.monotonic(), cpu_s(pids), stolen_s() - stolen
        await asyncio.gather(*ends)
    delays_ms = [reader.delays_ms(key) for reader in readers]
    steady = sorted(delay for delays in delays_ms for at, delay in delays if begun <= at < ended)
    took_s = ended - begun
    if not steady:
        raise SystemExit(
            "the first stream ended before the last began: this machine is too busy, or --seconds too short"
        )
    user_s, kernel_s = last[0] - first[0], last[1] - first[1]
    return {
        "streams": num_streams,
        "lost": num_streams * num_tokens - sum(map(len, delays_ms)),
        "tokens_per_s": len(steady) / took_s,
        "core": (user_s + kernel_s) / took_s,
        "user_us": 1e6 * user_s / len(steady),
        "kernel_us": 1e6 * kernel_s / len(steady),
        "stolen": stolen / took_s / (os.cpu_count() or 1),
        "p50_ms": steady[len(steady) // 2],
        "p99_ms": steady[len(steady) * 99 // 100],
        "max_ms": steady[-1],
    }


@contextlib.contextmanager
def process(target: Callable[..., None], *args: Any, **options: Any) -> Iterator[tuple[tuple[str, int], list[int]]]:
    """A server in a process of its own, from its start to its end: its address, and the pids that do its work."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=target, args=(theirs, *args), kwargs=options)
    server.start()
    theirs.close()
    try:
        yield ours.recv()
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
    "stolen": "6.1%",
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
    path = PATHS[options.path]
    period_s = options.period_ms / 1000
    num_tokens = int(options.seconds / period_s)
    print(f"{path}, one token per stream every {options.period_ms:g} ms, {num_tokens} tokens a stream, "
          f"{options.processes} API process(es)")  # fmt: skip
    heads = [f"{column:>{len(f'{0:{form}}')}}" for column, form in COLUMNS.items()]
    print(f"{'':>5} {' '.join(heads)}  keeps up")
    usable = os.sched_getaffinity(0)
    api_cores, other_cores = cores()
    gc.disable()  # what has come is kept to the end, and would be looked through in the middle of a turn
    with contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, api_cores)
        bare = stack.enter_context(process(bare_streams.serve, period_s, num_tokens))
        os.sched_setaffinity(0, usable)  # the node divides the cores itself
        api = stack.enter_context(process(serve, period_s, one_core=True, num_processes=options.processes))
        os.sched_setaffinity(0, other_cores)
        await measure(*api, path, 8, 20)
        asked = [("bare", *bare, "/v1/chat/completions", num_streams) for num_streams in options.bare]
        asked += [("api", *api, path, num_streams) for num_streams in options.streams]
        rows: dict[tuple[str, int], list[dict[str, float]]] = {}
        for _ in range(options.repeats):
            for name, address, pids, its_path, num_streams in asked:
                row = await measure(address, pids, its_path, num_streams, num_tokens)
                show(name, row, options.period_ms)
                rows.setdefault((name, num_streams), []).append(row)
    if options.repeats > 1:
        print(f"medians of {options.repeats}")
        for (name, _), same in rows.items():
            show(name, {column: median(row[column] for row in same) for column in COLUMNS}, options.period_ms)


def _counts(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming_api", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--streams", type=_counts, default="256,512,640,768,896,1024")
    parser.add_argument("--bare", type=_counts, default="512", help="numbers of streams for the peer")
    parser.add_argument("--processes", type=int, default=1, help="API processes of the node")
    parser.add_argument("--period-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=1, help="of everything; then the medians follow")
    parser.add_argument("--path", choices=PATHS, default="chat")
    return parser.parse_args()


if __name__ == "__main__":
    uvloop.run(main(options()))
