"""A load generator that costs little: closed loops of requests, or streams that all start together. Prints JSON."""

import argparse
import asyncio
import functools
import json
import re
import statistics
import time
from typing import Any

TIMED_EVERY = 8
"""Of the streams every eighth is looked at event by event; reading the others must cost as little as possible."""

_STAMP = re.compile(rb'"t":(\d+)')


class Client(asyncio.Protocol):
    """One connection, one request at a time. `done` is called at the end of each answer."""

    def __init__(self, load: "Load", *, timed: bool) -> None:
        self.load = load
        self.timed = timed
        self.transport: asyncio.Transport | None = None
        self.tail = b""
        self.sent_at = 0.0
        self.first = True
        self.left = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self.load.running:
            self.load.broken += 1

    def send(self) -> None:
        assert self.transport is not None
        self.first, self.tail, self.left = True, b"", -1
        self.sent_at = time.monotonic()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        load = self.load
        if self.first:
            self.first = False
            load.first_bytes.append(time.monotonic() - self.sent_at)
            if not data.startswith(b"HTTP/1.1 200"):
                load.errors += 1
        if load.streams and not self.timed:
            load.events += data.count(b'"t":')
            if data.endswith(b"0\r\n\r\n"):
                self.end(data)
            return
        data = self.tail + data
        if load.streams:
            now = time.monotonic_ns()
            stamps = _STAMP.findall(data)
            load.events += len(stamps)
            load.delays.extend([now - int(stamp) for stamp in stamps])
            # Keep what may be the beginning of a stamp or of the end.
            cut = data.rfind(b"\n\n")
            self.tail = data[cut + 2 :] if cut >= 0 else data
            if b"data: [DONE]" in data:
                self.tail = b""
                self.end(data)
            return
        self.tail = data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        found = re.search(rb"content-length: (\d+)", data[:end], re.IGNORECASE)
        if (found and len(data) >= end + 4 + int(found[1])) or (not found and data.endswith(b"0\r\n\r\n")):
            self.end(data)

    def end(self, data: bytes) -> None:
        self.load.latencies.append(time.monotonic() - self.sent_at)
        self.load.finished(self)


class Load:
    """One measurement."""

    def __init__(self, url: str, path: str, body: bytes, *, streams: bool, seconds: float) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.host, self.port = host, int(port)
        self.request = (
            b"POST %b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (path.encode(), f"{host}:{port}".encode(), len(body), body)
        )
        self.streams = streams
        self.seconds = seconds
        self.latencies: list[float] = []
        self.first_bytes: list[float] = []
        self.delays: list[int] = []
        self.events = self.errors = self.broken = 0
        self.running = True
        self.open = 0
        self.stop_at = 0.0
        self.all_done = asyncio.Event()

    def finished(self, client: Client) -> None:
        if not self.streams and time.monotonic() < self.stop_at:
            client.send()
            return
        self.open -= 1
        if not self.open:
            self.all_done.set()

    async def run(self, connections: int) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        clients = [
            (await loop.create_connection(functools.partial(Client, self, timed=timed), self.host, self.port))[1]
            for timed in (number % TIMED_EVERY == 0 for number in range(connections))
        ]
        self.open = connections
        started = time.monotonic()
        self.stop_at = started + self.seconds
        for client in clients:
            client.send()
        async with asyncio.timeout(self.seconds + 60.0):
            await self.all_done.wait()
        took = time.monotonic() - started
        self.running = False
        return {
            "requests": len(self.latencies),
            "seconds": took,
            "errors": self.errors,
            "broken": self.broken,
            "latency_s": _quantiles(self.latencies),
            "first_byte_s": _quantiles(self.first_bytes),
            "events": self.events,
            "delay_s": _quantiles([delay * 1e-9 for delay in self.delays]),
        }


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "p999": ordered[min(len(ordered) - 1, int(0.999 * len(ordered)))],
    }


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="for closed loops; streams end by themselves")
    parser.add_argument("--body-bytes", type=int, default=136)
    parser.add_argument("--stream", metavar="EVENTS,GAP_US", help="one stream per connection instead of closed loops")
    options = parser.parse_args()
    wanted = "json" if options.stream is None else "sse " + options.stream.replace(",", " ")
    fields = {"model": "m", "user": wanted, "stream": options.stream is not None, "max_tokens": 64, "prompt": ""}
    fields["prompt"] = "x" * max(1, options.body_bytes - len(json.dumps(fields)))
    load = None

    async def run() -> dict[str, Any]:
        nonlocal load
        body = json.dumps(fields).encode()
        load = Load(options.url, "/v1/completions", body, streams=options.stream is not None, seconds=options.seconds)
        return await load.run(options.connections)

    print(json.dumps(uvloop.run(run())))


if __name__ == "__main__":
    main()
