"""What the router and the hand-off add to the time to the first token, and where it goes.

    python -m benchmarks.added_ttft [--requests 40] [--prompt-tokens 64]

Three ways to the same first token on the same machine, asked in turn so that noise hits all alike: a standalone node,
the same node behind the router (no hand-off), and router + prefill node + decode node. Medians of streamed requests at
concurrency 1; the parts of the hand-off come from the decode node's own clock.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tools.demo import metric
from tools.make_checkpoint import main as make_checkpoint
from tools.up import ClusterConfig, Console, ProcessConfig, cluster, wait_until_proven

_LIMIT_MS = 15.0


def _configs(directory: Path, checkpoint: Path, first_port: int) -> ClusterConfig:
    """A router in front of a standalone-capable decode node, and a router in front of a prefill and a decode node."""
    engine = {
        "model": str(checkpoint),
        "device": "cpu",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 64 * 2**20,
    }
    ports = iter(range(first_port, first_port + 20))
    local_http, local_nodes, split_http, split_nodes = (next(ports) for _ in range(4))

    def node(port: int, router: int | None, **extra: Any) -> dict[str, Any]:
        routers = [f"127.0.0.1:{router}"] if router else []
        return {"port": port, "engine": engine, "membership": {"routers": routers}, "log_level": "warning", **extra}

    files: dict[str, tuple[str, dict[str, Any]]] = {
        "router-local": ("router", {"server": {"port": local_http}, "cluster": {"port": local_nodes}}),
        "router-split": ("router", {"server": {"port": split_http}, "cluster": {"port": split_nodes}}),
        "standalone": ("decode_node", node(next(ports), local_nodes, prefill="local")),
        "prefill": ("prefill_node", node(next(ports), split_nodes)),
        "decode": ("decode_node", node(next(ports), split_nodes)),
    }
    for name, (_, content) in files.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ClusterConfig(
        processes=tuple(
            ProcessConfig(name=name, module=module, config=f"{name}.yaml") for name, (module, _) in files.items()
        ),
        url=f"http://127.0.0.1:{split_http}",
    )


async def _ttft_s(session: aiohttp.ClientSession, url: str, prompt: list[int]) -> float:
    body = {"prompt": prompt, "max_tokens": 2, "stream": True, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                took = time.perf_counter() - began
                await response.read()
                return took
    raise RuntimeError(f"{url}: no token came")


async def _metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    names = ("tandem_handoff_seconds", "tandem_handoff_exposed_seconds", "tandem_handoff_wait_seconds")
    return {name: metric(text, f"{name}_sum") for name in names} | {"count": metric(text, f"{names[0]}_count")}


async def _measure(config: ClusterConfig, directory: Path, requests: int, prompt_tokens: int) -> None:
    urls = {name: _url(directory, name) for name in ("standalone", "router-local", "router-split", "decode")}
    console = Console()
    async with cluster(config, directory) as programs:
        watchers = [asyncio.create_task(program.watch(console)) for program in programs]
        try:
            for name in ("router-local", "router-split"):
                await wait_until_proven(urls[name], 120, handed_over=name == "router-split")
            async with aiohttp.ClientSession() as session:
                await _report(session, urls, requests, prompt_tokens)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)


def _url(directory: Path, name: str) -> str:
    content = yaml.safe_load((directory / f"{name}.yaml").read_text())
    return f"http://127.0.0.1:{content.get('server', content)['port']}"


async def _report(session: aiohttp.ClientSession, urls: dict[str, str], requests: int, prompt_tokens: int) -> None:
    rng = random.Random(1)
    ways = ("standalone", "router-local", "router-split")
    times: dict[str, list[float]] = {way: [] for way in ways}
    before: dict[str, float] = {}
    for number in range(-5, requests):
        if number == 0:
            before = await _metrics(session, urls["decode"])
        prompt = [rng.randrange(3, 900) for _ in range(prompt_tokens)]
        for way in ways:
            took = await _ttft_s(session, urls[way], prompt)
            if number >= 0:
                times[way].append(1000 * took)
    after = await _metrics(session, urls["decode"])
    count = after["count"] - before["count"]
    part = {name: 1000 * (after[name] - before[name]) / count for name in after if name != "count"}
    alone, behind, split = (statistics.median(times[way]) for way in ways)
    prefilled = part["tandem_handoff_wait_seconds"]
    print(f"{requests} requests of {prompt_tokens} tokens, concurrency 1, median TTFT in ms\n")
    print(f"{'standalone node':44s} {alone:8.2f}")
    print(f"{'router + standalone node':44s} {behind:8.2f}   router adds {behind - alone:.2f}")
    print(f"{'router + prefill node + decode node':44s} {split:8.2f}   hand-off adds {split - behind:.2f}")
    print(f"{'added in all (limit 15)':44s} {split - alone:8.2f}\n")
    print("means on the decode node's clock, ms")
    print(f"{'claim sent until prefill was ready':44s} {prefilled:8.2f}   the prompt's computation is in here")
    print(f"{'first read until last read':44s} {part['tandem_handoff_seconds']:8.2f}")
    print(f"{'prefill ready until last read (exposed)':44s} {part['tandem_handoff_exposed_seconds']:8.2f}")
    if split - alone > _LIMIT_MS:
        raise SystemExit(f"over the limit of {_LIMIT_MS:g} ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.added_ttft", description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--first-port", type=int, default=31000, help="twenty ports from here are used")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-ttft-") as name:
        directory = Path(name)
        checkpoint = directory / "tiny-v4"
        make_checkpoint(["--preset", "tiny", "--out", str(checkpoint), "--quiet"])
        config = _configs(directory, checkpoint, arguments.first_port)
        asyncio.run(_measure(config, directory, arguments.requests, arguments.prompt_tokens))


if __name__ == "__main__":
    main()
