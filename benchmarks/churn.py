"""Nodes join, drain, leave, are killed and restarted under load, and no client notices.

    python -m benchmarks.churn [--minutes 10] [--pause 5] [--clients 8] [--seed 1] [--json FILE]

Real processes with a tiny model: a router, one prefill and one decode node that stay, and others that come and go. The
clients send prompts whose answers were recorded before, half of them streamed; every answer must have exactly the
recorded tokens, and none may fail: what a killed node was doing is done or continued elsewhere. At the end all pools
must be free, no transfer open, and the memory of the processes that stayed must not have grown. Exits 1 otherwise.
"""

import argparse
import asyncio
import collections
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.churn_nodes import Fleet, Process, Role
from tools.demo import metric
from tools.make_checkpoint import main as make_checkpoint

MAX_TOKENS = 48
LENGTHS = (1, 9, 31, 32, 64, 77, 128, 200, 257, 300, 500)
REQUEST_S = 120.0
AUDIT_S = 60.0
SAMPLE_EVERY_S = 2.0
MAX_NODES = {"prefill": 3, "decode": 4}
ALLOWED_GROWTH_MIB = 16.0


@dataclass
class Record:
    """What happened."""

    answers: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    """Requests."""
    troubles: list[str] = field(default_factory=list)
    """Nodes that did not come up, or did not end as they should."""
    actions: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)


async def complete(
    session: aiohttp.ClientSession, url: str, prompt: list[int], max_tokens: int, *, stream: bool
) -> list[int]:
    """The answer's tokens. Raises RuntimeError for anything but a good and whole one."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    async with session.post(f"{url}/v1/completions", json=body) as response:
        raw = await response.read()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {raw[:300]!r}")
    if not stream:
        ids: list[int] = json.loads(raw)["choices"][0]["token_ids"]
        return ids
    events = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise RuntimeError(f"a stream without an end: {raw[-300:]!r}")
    chunks = [json.loads(event) for event in events[:-1]]
    if any("error" in chunk for chunk in chunks):
        raise RuntimeError(f"an error in the stream: {raw[-300:]!r}")
    return [token_id for chunk in chunks for choice in chunk["choices"] for token_id in choice["token_ids"]]


class Load:
    """The clients."""

    def __init__(self, url: str, record: Record, rng: random.Random) -> None:
        self._url = url
        self._record = record
        self._rng = rng
        self._expected: dict[int, tuple[list[int], list[int]]] = {}
        self._timeout = aiohttp.ClientTimeout(total=REQUEST_S)

    async def learn(self) -> None:
        """Record the answers while nothing disturbs them."""
        async with aiohttp.ClientSession(timeout=self._timeout) as session:
            for number, length in enumerate(LENGTHS):
                prompt = [self._rng.randrange(3, 900) for _ in range(length)]
                answer = await complete(session, self._url, prompt, MAX_TOKENS, stream=False)
                self._expected[number] = (prompt, answer)

    async def client(self, until: float) -> None:
        """One request after the other."""
        record, rng = self._record, self._rng
        async with aiohttp.ClientSession(timeout=self._timeout) as session:
            while (began := time.monotonic()) < until:
                prompt, expected = self._expected[rng.randrange(len(LENGTHS))]
                max_tokens, stream = rng.randint(1, MAX_TOKENS), rng.random() < 0.5
                kind = "streamed" if stream else "whole"
                try:
                    got = await complete(session, self._url, prompt, max_tokens, stream=stream)
                    if got != expected[:max_tokens]:
                        raise RuntimeError(f"wrong tokens {got}, expected {expected[:max_tokens]}")
                except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                    record.failures.append(f"{kind}, {len(prompt)} + {max_tokens} tokens: {error or type(error)}")
                    print(f"  FAILED {record.failures[-1]}", flush=True)
                else:
                    record.answers[kind] += 1
                    record.seconds.append(time.monotonic() - began)


class Mischief:
    """Whoever makes nodes come and go. The first node of each role is left alone."""

    def __init__(self, fleet: Fleet, record: Record, rng: random.Random, pause_s: float) -> None:
        self._fleet = fleet
        self._record = record
        self._rng = rng
        self._pause_s = pause_s

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                await self._act()
            except RuntimeError as error:
                self._record.troubles.append(str(error))
                print(f"  FAILED {error}", flush=True)
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * self._pause_s)

    async def _act(self) -> None:
        role: Role = self._rng.choice(("prefill", "decode", "decode"))
        others = [node for name, node in self._fleet.nodes.items() if name.startswith(role) and name != f"{role}0"]
        up = [node for node in others if node.running]
        down = [node for node in others if not node.running]
        choices = []
        if up:
            choices += ["kill", "kill", "drain", "restart"]
        if down:
            choices += ["start again"] * 2
        if len(others) + 1 < MAX_NODES[role]:
            choices += ["join"]
        action = self._rng.choice(choices)
        self._record.actions[f"{role}: {action}"] += 1
        node = self._fleet.new_node(role) if action == "join" else self._rng.choice(down if "again" in action else up)
        print(f"  {action} {node.name}", flush=True)
        if action == "kill":
            await node.kill()
        elif action == "drain":
            await node.drain()
        elif action == "restart":
            await node.drain()
            await node.start()
        else:
            await node.start()


async def watch_memory(processes: list[Process], record: Record, until: float) -> None:
    while time.monotonic() < until:
        for process in processes:
            record.memory.setdefault(process.name, []).append(process.rss_mib())
        await asyncio.sleep(SAMPLE_EVERY_S)


async def get_json(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as response:
        return await response.json()


async def audit(fleet: Fleet) -> list[str]:
    """What is still held somewhere, once everything should be over; empty is good."""
    deadline = time.monotonic() + AUDIT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        while True:
            found = []
            for node in fleet.nodes.values():
                if node.running:
                    for rank in await get_json(session, f"{node.url}/cluster/ranks"):
                        found += _not_idle(node.name, rank)
            metrics = await _metrics(session, fleet.router.url)
            for name in ("transfers_open", "transfers_stranded"):
                if metrics[name]:
                    found.append(f"router: {name}={metrics[name]:g}")
            if not found or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.5)


def _not_idle(name: str, rank: dict[str, Any]) -> list[str]:
    counts = ("running", "waiting", "receiving", "held", "pages_quarantined")
    busy = [f"{count}={rank[count]}" for count in counts if rank[count]]
    busy += [
        f"{rank[f'{kind}_free']} of {rank[f'{kind}_total']} {kind} free"
        for kind in ("pages", "slots")
        if rank[f"{kind}_free"] != rank[f"{kind}_total"]
    ]
    return [f"{name} rank {rank['rank']}: {', '.join(busy)}"] if busy else []


_METRICS = ("resumes_total", "broken_streams_total", "transfers_opened_total", "transfers_finished_total",
            "transfers_released_total", "transfers_open", "transfers_stranded", "node_joins_total",
            "node_losses_total")  # fmt: skip


async def _metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    return {name: metric(text, f"tandem_router_{name}") for name in _METRICS}


async def churn(options: argparse.Namespace, directory: Path, checkpoint: Path) -> dict[str, Any]:
    record, fleet = Record(), Fleet(directory, checkpoint)
    load = Load(fleet.router.url, record, random.Random(options.seed))
    mischief = Mischief(fleet, record, random.Random(options.seed + 1), options.pause)
    try:
        nodes = [fleet.new_node(role) for role in ("prefill", "prefill", "decode", "decode")]  # type: ignore[arg-type]
        await fleet.router.start()
        await asyncio.gather(*(node.start() for node in nodes))
        await _joined(fleet, len(nodes))
        await load.learn()
        print(f"{len(LENGTHS)} answers recorded; {options.clients} clients for {options.minutes:g} min", flush=True)
        until = time.monotonic() + 60 * options.minutes
        stayed = [fleet.router, fleet.nodes["prefill0"], fleet.nodes["decode0"]]
        async with asyncio.TaskGroup() as group:
            for _ in range(options.clients):
                group.create_task(load.client(until))
            group.create_task(mischief.run(until))
            group.create_task(watch_memory(stayed, record, until))
        left = await audit(fleet)
        async with aiohttp.ClientSession() as session:
            metrics = await _metrics(session, fleet.router.url)
    except Exception:
        print(fleet.router.log_tail(), file=sys.stderr)
        raise
    finally:
        await fleet.stop()
    return report(record, metrics, left, options)


async def _joined(fleet: Fleet, count: int) -> None:
    """Until the router knows all nodes and a request went all the way."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(120):
        while True:
            workers = (await get_json(session, f"{fleet.router.url}/workers"))["workers"]
            health = await get_json(session, f"{fleet.router.url}/health")
            if sum(worker["is_healthy"] for worker in workers) == count and health["status"] == "healthy":
                return
            await asyncio.sleep(0.2)


def report(record: Record, metrics: dict[str, float], left: list[str], options: argparse.Namespace) -> dict[str, Any]:
    memory = {}
    for name, samples in record.memory.items():
        # The first third is warm-up: buffers and caches grow to their size.
        middle, last = samples[len(samples) // 3 : 2 * len(samples) // 3], samples[2 * len(samples) // 3 :]
        if middle and last:
            memory[name] = [round(statistics.median(part), 1) for part in (middle, last)]
    seconds = sorted(record.seconds) or [0.0]
    grown = [f"{name} grew from {a} to {b} MiB" for name, (a, b) in memory.items() if b - a > ALLOWED_GROWTH_MIB]
    return {
        "minutes": options.minutes,
        "answers": dict(record.answers),
        "failed": len(record.failures),
        "actions": dict(sorted(record.actions.items())),
        "router": {name: int(value) for name, value in metrics.items()},
        "latency_s": {"p50": round(seconds[len(seconds) // 2], 3), "max": round(seconds[-1], 3)},
        "memory_mib": memory,
        "problems": [*record.failures, *record.troubles, *left, *grown],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.churn", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pause", type=float, default=5.0, help="mean seconds between two changes")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-churn-") as name:
        directory = Path(name)
        checkpoint = directory / "tiny-v4"
        make_checkpoint(["--preset", "tiny", "--out", str(checkpoint), "--seed", "0", "--quiet"])
        result = asyncio.run(churn(options, directory, checkpoint))
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text)
    if result["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
