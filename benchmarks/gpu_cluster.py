"""The whole cluster on the GPUs of this machine, as its users would load it, beside one node that does both.

    python -m benchmarks.gpu_cluster --out DIR [--layers 43] [--gpus N] [--shapes standalone,pair]
                                     [--load INPUT:OUTPUT:AT_ONCE:REQUESTS ...]

Router and nodes are started as an operator starts them, with DeepSeek-V4-Flash's first `--layers` layers at full width,
dummy weights, and a vocabulary of made-up words. Prompts are token ids, answers are streamed and all of their length.

    standalone  one node over all GPUs that prefills and decodes (data parallel, experts shared), behind the router
    pair        half of the GPUs prefill, half decode; on one GPU, or with --together, both use all of them

The same loads go to each shape through `tools.bench`; times are what its client saw. "equal" counts answers, of eight
prompts that were sent at temperature 0, which are the first shape's word for word. Ranks that share experts add in
another order when there are more of them, so that shapes with other numbers of ranks may differ.

Node logs, configurations and every record are kept under DIR. Exits 1 if a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
import torch
import yaml

from benchmarks.gpu_rank import first_layers
from benchmarks.ports import free_port
from model.presets import flash
from runtime.errors import TandemError
from tools import bench
from tools.bench_report import Summary
from tools.tiny_tokenizer import write_tokenizer
from tools.up import ClusterConfig, Console, ProcessConfig, cluster, wait_until_proven

SHAPES = ("standalone", "pair")
WORDS = 1000
"""Of the vocabulary, what a real tokenizer is trained on; the rest are made up."""
SPOKEN_LENGTHS = (1, 100, 257, 1000, 2049, 3000, 5000, 8000)
SPOKEN_TOKENS = 24
ANSWER_S = 120.0


class Load(msgspec.Struct, frozen=True):
    """Tokens of each prompt and answer, how many are under way together, how many in all."""

    input_len: int
    output_len: int
    at_once: int
    requests: int


def write_model(directory: Path, layers: int) -> None:
    """config.json and a tokenizer with a word for every id."""
    config = first_layers(flash(), layers)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_bytes(config.to_json())
    write_tokenizer(directory, WORDS, config.max_position_embeddings)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    taken = set(words.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    words.update({f"\u0120w{number}": number for number in range(config.vocab_size) if number not in taken})
    path.write_text(json.dumps(tokenizer))


class Shape:
    """The configuration files of one way to use the GPUs."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.directory: Path = options.out / name
        self.directory.mkdir(parents=True, exist_ok=True)
        gpus = list(range(options.gpus))
        self._port, self._cluster_port = free_port(), free_port()
        self._options = options
        self._processes = [self._process("router", "router", [], self._router())]
        if name == "standalone":
            node = self._node(gpus, {"max_num_seqs": 512, "max_num_batched_tokens": options.step_tokens})
            self._add("decode_node", gpus, node | {"prefill": "local"})
        else:
            together = options.together or len(gpus) == 1
            half = len(gpus) // 2
            prefill, decode = (gpus, gpus) if together else (gpus[:half], gpus[half:])
            self._add(
                "prefill_node", prefill,
                self._node(prefill, {"max_num_seqs": 8, "max_num_batched_tokens": options.prompt_tokens}),
            )  # fmt: skip
            self._add("decode_node", decode, self._node(decode, {"max_num_seqs": 512, "max_num_batched_tokens": 512}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def hands_over(self) -> bool:
        return self.name != "standalone"

    @property
    def config(self) -> ClusterConfig:
        return ClusterConfig(processes=tuple(self._processes), url=self.url, stop_timeout_s=20.0)

    def _add(self, module: str, gpus: Sequence[int], config: dict[str, Any]) -> None:
        self._processes.append(self._process(module.removesuffix("_node"), module, gpus, config))

    def _process(self, name: str, module: str, gpus: Sequence[int], config: dict[str, Any]) -> ProcessConfig:
        (self.directory / f"{name}.yaml").write_text(yaml.safe_dump(config))
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        return ProcessConfig(name=name, module=module, config=f"{name}.yaml", env=seen)

    def _router(self) -> dict[str, Any]:
        return {
            "server": {"host": "127.0.0.1", "port": self._port},
            "cluster": {"host": "127.0.0.1", "port": self._cluster_port},
        }

    def _node(self, gpus: Sequence[int], engine: dict[str, Any]) -> dict[str, Any]:
        model = {"model": str(self._options.out / "model"), "load_format": "dummy", "max_model_len": 65536}
        state = {"kv_cache_memory_bytes": self._options.state_gib << 30}
        return {
            "host": "127.0.0.1",
            "port": free_port(),
            "data_parallel_size": len(gpus),
            "enable_expert_parallel": len(gpus) > 1,
            "ready_timeout_s": self._options.ready_s,
            "engine": model | state | engine,
            "transfer": {"transport": self._options.transport},
            "membership": {"routers": [f"127.0.0.1:{self._cluster_port}"]},
        }


class Log(Console):
    """Lines of all processes, into a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w", buffering=1)

    def line(self, text: str) -> None:
        self._file.write(text + "\n")


async def spoken(url: str) -> list[str]:
    """What is said to eight prompts, all at once."""
    rng = random.Random(3)
    prompts = [[rng.randrange(300, 100_000) for _ in range(length)] for length in SPOKEN_LENGTHS]
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        model = await bench.first_model(session, url, {})

        async def answer(prompt: list[int]) -> str:
            body = {
                "model": model, "prompt": prompt, "temperature": 0, "max_tokens": SPOKEN_TOKENS, "ignore_eos": True,
            }  # fmt: skip
            async with session.post(f"{url}/v1/completions", json=body) as response:
                response.raise_for_status()
                return str(orjson.loads(await response.read())["choices"][0]["text"])

        return list(await asyncio.gather(*map(answer, prompts)))


async def measure(shape: Shape, loads: Sequence[Load], options: argparse.Namespace) -> tuple[list[str], list[Summary]]:
    """Start the shape, load it, stop it. Raises ProcessDied when one of its processes ends or it is not ready."""
    log = Log(shape.directory / "log.txt")

    async def load() -> tuple[list[str], list[Summary]]:
        await wait_until_proven(shape.url, options.ready_s, handed_over=shape.hands_over)
        said = await spoken(shape.url)
        summaries = []
        for number, each in enumerate(loads):
            words = [
                *("--url", shape.url, "--num-prompts", str(each.requests), "--max-concurrency", str(each.at_once)),
                *("--input-len", str(each.input_len), "--output-len", str(each.output_len), "--seed", str(number)),
                *("--num-gpus", str(options.gpus), "--idle-timeout", str(ANSWER_S)),
                *("--output", str(shape.directory / f"load-{number}.json")),
            ]
            summaries.append(await bench.bench(bench.parser().parse_args(words)))
        return said, summaries

    async with cluster(shape.config, shape.directory) as programs:
        watchers = [asyncio.create_task(program.watch(log)) for program in programs]
        loading = asyncio.create_task(load())
        try:
            await asyncio.wait([loading, *watchers], return_when=asyncio.FIRST_COMPLETED)
            for watcher in watchers:
                if watcher.done():
                    watcher.result()
            return await loading
        finally:
            for task in (loading, *watchers):
                task.cancel()
            await asyncio.gather(loading, *watchers, return_exceptions=True)


def row(load: Load, shape: str, summary: Summary, equal: str) -> str:
    cells = (
        f"{load.input_len:,} / {load.output_len:,}", f"{load.at_once}", shape, f"{summary.total_throughput:,.0f}",
        f"{summary.output_throughput:,.0f}", f"{summary.ttft.p50:,.0f} / {summary.ttft.p99:,.0f}",
        f"{summary.tpot.p50:.1f} / {summary.tpot.p99:.1f}", f"{summary.itl.p99:.1f}", equal,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| tokens in / out | at once | shape | tokens/s | generated/s | TTFT ms p50 / p99 | TPOT ms p50 / p99 | "
    "gap ms p99 | equal |\n|---|---|---|---|---|---|---|---|---|"
)


async def run(options: argparse.Namespace) -> bool:
    """Whether every request was answered."""
    loads = [Load(*map(int, word.split(":"))) for word in options.load]
    write_model(options.out / "model", options.layers)
    first: list[str] | None = None
    rows, whole = [], True
    for name in options.shapes.split(","):
        shape = Shape(name, options)
        try:
            said, summaries = await measure(shape, loads, options)
        except TandemError as error:
            print(f"{name}: {error}", flush=True)
            whole = False
            continue
        first = first if first is not None else said
        equal = f"{sum(map(str.__eq__, said, first))} of {len(said)}"
        rows += [row(load, name, summary, equal) for load, summary in zip(loads, summaries, strict=True)]
        whole &= all(summary.completed == summary.requests for summary in summaries)
    print(f"{options.gpus} x {torch.cuda.get_device_name()}, {options.layers} layers\n\n{HEADER}")
    print("\n".join(rows), flush=True)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cluster", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--together", action="store_true", help="both nodes of the pair use all GPUs")
    parser.add_argument("--transport", default="intra_node", choices=("intra_node", "tcp", "rdma"))
    parser.add_argument("--load", action="append", metavar="INPUT:OUTPUT:AT_ONCE:REQUESTS", help="repeatable")
    parser.add_argument("--state-gib", type=int, default=16, help="of each rank, for pages and slots")
    parser.add_argument("--prompt-tokens", type=int, default=16384, help="of a prefill node's step")
    parser.add_argument("--step-tokens", type=int, default=2048, help="of a step of the node that does both")
    parser.add_argument("--ready-s", type=float, default=600.0)
    options = parser.parse_args()
    if options.gpus < 1:
        parser.error("a GPU is needed")
    if unknown := set(options.shapes.split(",")) - set(SHAPES):
        parser.error(f"--shapes: {', '.join(sorted(unknown))} is none of {', '.join(SHAPES)}")
    options.out = options.out.resolve()
    options.load = options.load or ["8192:256:32:64"]
    if not asyncio.run(run(options)):
        sys.exit(1)


if __name__ == "__main__":
    main()
