"""Load an OpenAI-compatible server and say what its users would feel.

    python -m tools.bench --url http://127.0.0.1:30000 --num-prompts 256 --request-rate 4 --input-len 8192 \\
        --output-len 1024 --goodput ttft:1000 tpot:20 --output run.json

Arrivals are open-loop (`--request-rate`), closed-loop (`--max-concurrency` alone) or both. Works against any server
with /v1/completions or /v1/chat/completions; a bearer token is taken from OPENAI_API_KEY. Exits 1 if a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec
import orjson

from runtime.errors import ConfigError
from tools.bench_client import Endpoint, Record, send
from tools.bench_report import SLO_KEYS, Summary, summarise, table
from tools.bench_workload import Job, arrivals, generated, lognormal_lengths, replayed, uniform_lengths

_WARM_UP_SEED = 10_007
"""Added to the seed for warm-up prompts, so that they leave nothing in a prefix cache that the run would hit."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="Load an OpenAI-compatible server; report TTFT, TPOT, ITL, throughput and goodput.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    target = parser.add_argument_group("target")
    target.add_argument("--url", default="http://127.0.0.1:30000", help="server, without /v1")
    target.add_argument("--model", help="default: the first the server lists")
    target.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="chat sends text")
    target.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="repeatable")
    target.add_argument("--extra-body", default="{}", metavar="JSON", help="merged into every body")
    target.add_argument("--stop-at-eos", action="store_true", help="do not ask for exactly --output-len tokens")
    target.add_argument("--idle-timeout", type=float, default=600.0, help="longest silence of a request, s")

    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=int, default=128)
    load.add_argument("--request-rate", type=float, default=float("inf"), help="arrivals per second; inf: all at once")
    load.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; below: burstier; above: steadier")
    load.add_argument("--max-concurrency", type=int, help="requests under way at one time")
    load.add_argument("--warmup", type=int, default=0, help="requests sent first, one after another, and not counted")
    load.add_argument("--seed", type=int, default=0)

    work = parser.add_argument_group("workload")
    work.add_argument("--workload", choices=("random", "conversation", "trace"), default="random")
    work.add_argument("--input-len", type=int, default=1024, help="tokens (random), mean tokens (conversation)")
    work.add_argument("--output-len", type=int, default=128, help="tokens (random), mean tokens (conversation)")
    work.add_argument("--range-ratio", type=float, default=0.0, help="random: lengths vary by this part of the mean")
    work.add_argument("--max-len", type=int, default=8192, help="conversation: longest prompt and answer")
    work.add_argument("--prefix-len", type=int, default=0, help="tokens that all prompts begin with, in addition")
    work.add_argument("--vocab-size", type=int, default=100_000, help="prompt token ids are below this")
    work.add_argument("--trace", type=Path, help="trace: a Mooncake trace (one JSON object a line)")
    work.add_argument("--speed", type=float, default=1.0, help="trace: times as fast as recorded")

    out = parser.add_argument_group("report")
    out.add_argument("--goodput", nargs="+", default=[], metavar="KEY:MS", help=f"bounds, of {', '.join(SLO_KEYS)}")
    out.add_argument("--num-gpus", type=int, help="also report tokens/s per GPU")
    out.add_argument("--output", type=Path, help="write settings, summary and records as JSON")
    return parser


def parse_slo(words: Sequence[str]) -> dict[str, float]:
    """["ttft:1000", "tpot:20"] -> bounds in milliseconds. Raises ConfigError."""
    slo: dict[str, float] = {}
    for word in words:
        key, _, bound = word.partition(":")
        try:
            slo[key] = float(bound)
        except ValueError:
            raise ConfigError(f"--goodput {word}: expected KEY:MILLISECONDS") from None
        if key not in SLO_KEYS or slo[key] <= 0:
            raise ConfigError(f"--goodput {word}: expected one of {', '.join(SLO_KEYS)} and a positive bound")
    return slo


def jobs_of(options: argparse.Namespace, count: int, seed: int) -> list[Job]:
    """The workload the options describe. Raises ConfigError."""
    for name in ("num_prompts", "input_len", "output_len", "vocab_size", "request_rate", "burstiness", "speed"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be positive")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: must not be negative")
    if options.workload == "trace":
        if options.trace is None:
            raise ConfigError("--workload trace needs --trace FILE")
        return replayed(options.trace, count, vocab_size=options.vocab_size, speed=options.speed, seed=seed)
    rng = random.Random(seed)
    times = arrivals(count, options.request_rate, options.burstiness, rng)
    if options.workload == "conversation":
        inputs = lognormal_lengths(options.input_len, options.max_len, rng)
        outputs = lognormal_lengths(options.output_len, options.max_len, rng)
    else:
        inputs = uniform_lengths(options.input_len, options.range_ratio, rng)
        outputs = uniform_lengths(options.output_len, options.range_ratio, rng)
    return generated(
        inputs, outputs, times, vocab_size=options.vocab_size, prefix_len=options.prefix_len, seed=seed
    )  # fmt: skip


async def endpoint_of(options: argparse.Namespace, session: aiohttp.ClientSession) -> Endpoint:
    """Where to send, with the model's name asked for if it was not given. Raises ConfigError."""
    headers = dict(_header(word) for word in options.header)
    if key := os.environ.get("OPENAI_API_KEY"):
        headers.setdefault("authorization", f"Bearer {key}")
    try:
        extra_body = orjson.loads(options.extra_body)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"--extra-body: not JSON: {error}") from None
    if not isinstance(extra_body, dict):
        raise ConfigError("--extra-body: expected a JSON object")
    url = options.url.rstrip("/").removesuffix("/v1")
    return Endpoint(
        url=url,
        model=options.model or await first_model(session, url, headers),
        kind=options.endpoint,
        headers=headers,
        extra_body=extra_body,
        ignore_eos=not options.stop_at_eos,
        idle_timeout_s=options.idle_timeout,
    )


def _header(word: str) -> tuple[str, str]:
    name, separator, value = word.partition(":")
    if not separator or not name.strip():
        raise ConfigError(f"--header {word}: expected NAME:VALUE")
    return name.strip().lower(), value.strip()


async def first_model(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> str:
    try:
        async with session.get(f"{url}/v1/models", headers=headers, timeout=aiohttp.ClientTimeout(total=10)) as answer:
            body = await answer.read()
            if answer.status == 200:
                return str(orjson.loads(body)["data"][0]["id"])
            problem = f"HTTP {answer.status}"
    except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError, LookupError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}".removesuffix(": ")
    raise ConfigError(f"{url}/v1/models names no model ({problem}): use --model")


async def load(
    session: aiohttp.ClientSession, endpoint: Endpoint, jobs: Sequence[Job], max_concurrency: int | None
) -> list[Record]:
    """Send every job at its time, at most `max_concurrency` at once. Records are in the order of the jobs."""
    places: contextlib.AbstractAsyncContextManager[object] = (
        asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    )
    started = time.perf_counter()

    async def one(job: Job) -> Record:
        async with places:
            return await send(session, endpoint, job, started)

    tasks: list[asyncio.Task[Record]] = []
    async with asyncio.TaskGroup() as group:
        for job in jobs:
            if (wait_s := started + (job.arrives_s or 0.0) - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(one(job)))
    return [task.result() for task in tasks]


async def bench(options: argparse.Namespace) -> Summary:
    """Warm up, run, report, write. Raises ConfigError."""
    slo = parse_slo(options.goodput)
    jobs = jobs_of(options, options.num_prompts, options.seed)
    warm_up = jobs_of(options, options.warmup, options.seed + _WARM_UP_SEED) if options.warmup else []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as session:
        endpoint = await endpoint_of(options, session)
        for job in warm_up:
            await send(session, endpoint, job, time.perf_counter())
        print(f"{len(jobs)} requests to {endpoint.address}, model {endpoint.model}", file=sys.stderr, flush=True)
        records = await load(session, endpoint, jobs, options.max_concurrency)
    summary = summarise(records, slo=slo, num_gpus=options.num_gpus)
    print(table(summary))
    if options.output is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        report = {"settings": settings | {"model": endpoint.model}, "summary": summary, "records": records}
        options.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    import uvloop

    options = parser().parse_args(arguments)
    try:
        summary = uvloop.run(bench(options))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    if summary.completed < summary.requests:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
