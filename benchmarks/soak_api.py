"""Thousands of requests, good and hostile, against one API process: no 5xx, no hang, and memory that stays flat.

    python -m benchmarks.soak_api [--requests 20000] [--concurrency 16] [--seed 0]

Valid bodies of every endpoint are mutated at random: values replaced by ones of another kind or size, keys removed or
added, bytes flipped; some clients leave before their answer is complete. The engine process behind the API generates
without a model (`benchmarks.paced_engine`). Memory is the resident size of the API process: it grows while bounded
caches fill (responses, prompt pieces, grammars) and must then stay.
"""

import argparse
import asyncio
import copy
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from typing import Any

import aiohttp
import msgspec
import uvloop

from benchmarks.streaming_api import serve

PERIOD_S = 0.002
MAX_MODEL_LEN = 512
"""Bounds what a request without a bound of its own generates."""
TIMEOUT_S = 30.0

_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "x", "reasoning_content": "r", "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "result"},
            ],
            "tools": [_TOOL],
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": 6,
            "chat_template_kwargs": {"thinking": True, "reasoning_effort": "high"},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 3,
            "n": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 1,
            "stop": ["a", "b"],
            "logit_bias": {"5": 1.0},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        },
    ),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 4, "stream": True}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 2, "n": 2, "return_token_ids": True}),
    ("/v1/completions", {"prompt": "hi", "suffix": "x", "max_tokens": 2, "bad_words": ["a"], "stop_token_ids": [9]}),
    (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_tokens": 4,
            "system": "s",
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "stream": True,
        },
    ),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 4, "instructions": "be kind"}),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "r"},
            ],
            "stream": True,
            "max_output_tokens": 4,
            "text": {"format": {"type": "json_object"}},
        },
    ),
    ("/tokenize", {"prompt": "hi"}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "hi"}]}),
]
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ",
    "x" * 5000,
    "</think>", "<｜DSML｜tool_calls>", "<｜User｜>", "\u0000", "\ud800", "🙂" * 300, "-1", "1e5", "NaN", "null",
    [], {}, [[]], [None], {"": ""}, [[[[[[]]]]]], ["a"] * 300, list(range(300)), {"type": "x"}, {"role": "user"},
    json.loads("[" * 60 + "]" * 60),
]  # fmt: skip


FAILED = (b'"InternalServerError"', b'"api_error"', b'"server_error"')
"""What the server's own failure is called once a stream has begun, in the three families of APIs."""


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value inside `value`, itself left out."""
    found = []
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((*place, key))
        found += places(item, (*place, key))
    return found


def mutate(dice: random.Random, body: dict[str, Any]) -> bytes:
    """A copy with one to three things changed."""
    body = copy.deepcopy(body)
    for _ in range(dice.randint(1, 3)):
        paths = places(body)
        if not paths:
            break
        *parents, key = dice.choice(paths)
        parent: Any = body
        for step in parents:
            parent = parent[step]
        action = dice.random()
        if action < 0.65:
            parent[key] = copy.deepcopy(dice.choice(HOSTILE))
        elif action < 0.8:
            del parent[key]
        elif isinstance(parent, dict):
            parent[f"new{dice.randint(0, 9)}"] = copy.deepcopy(dice.choice(HOSTILE))
        else:
            parent.append(copy.deepcopy(dice.choice(HOSTILE)))
    raw = bytearray(json.dumps(body).encode())
    if dice.random() < 0.1:
        for _ in range(dice.randint(1, 4)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
    return bytes(raw)


class Outcome(msgspec.Struct):
    """What a run came to. `faults` holds the first few requests that were answered with a 5xx or not at all."""

    statuses: Counter[str]
    faults: list[str]
    rss: list[int]
    """Bytes after each tenth of the requests."""
    seconds: float = 0.0
    still_running: int = 0


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def soak(base_url: str, pid: int, num_requests: int, concurrency: int, seed: int) -> Outcome:
    """Send everything and say what came back."""
    outcome = Outcome(Counter(), [], [])
    numbers = iter(range(num_requests))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, connector=connector) as session:

        async def client() -> None:
            for number in numbers:
                if number and number % (num_requests // 10) == 0:
                    outcome.rss.append(rss_bytes(pid))
                dice = random.Random(f"{seed}/{number}")
                path, body = dice.choice(VALID)
                raw = json.dumps(body).encode() if dice.random() < 0.3 else mutate(dice, body)
                status = await _send(session, path, raw, leaves=dice.random() < 0.1)
                outcome.statuses[status] += 1
                if status[0] == "5" or status == "hung":
                    outcome.faults = [*outcome.faults, f"#{number} {path} {status}: {raw[:300]!r}"][:10]

        began = time.monotonic()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        outcome.seconds = time.monotonic() - began
        await asyncio.sleep(0.5)
        async with session.get("/load") as response:
            outcome.still_running = (await response.json())["server_load"]
    outcome.rss.append(rss_bytes(pid))
    return outcome


async def _send(session: aiohttp.ClientSession, path: str, raw: bytes, *, leaves: bool) -> str:
    headers = {"Content-Type": "application/json"}
    try:
        async with asyncio.timeout(TIMEOUT_S), session.post(path, data=raw, headers=headers) as response:
            if leaves:
                await response.content.readany()
                response.close()
                return "left"
            answer = await response.read()
            if response.status == 200 and any(name in answer for name in FAILED):
                return "500 in a stream"
            return str(response.status)
    except TimeoutError:
        return "hung"


def run(num_requests: int, concurrency: int = 16, seed: int = 0) -> Outcome:
    """Start an API process, soak it, stop it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, PERIOD_S, MAX_MODEL_LEN))
    server.start()
    theirs.close()
    try:
        (host, port), _ = ours.recv()
        assert server.pid is not None
        return uvloop.run(soak(f"http://{host}:{port}", server.pid, num_requests, concurrency, seed))
    finally:
        ours.close()
        server.join(10)
        if server.is_alive():
            server.kill()
            server.join()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak_api", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = run(options.requests, options.concurrency, options.seed)
    print(f"{options.requests} requests in {outcome.seconds:.1f} s ({options.requests / outcome.seconds:.0f}/s)")
    print("answers: " + ", ".join(f"{status}: {count}" for status, count in sorted(outcome.statuses.items())))
    print("MiB resident after each tenth: " + ", ".join(f"{rss / 2**20:.1f}" for rss in outcome.rss))
    print(f"still running: {outcome.still_running}")
    for fault in outcome.faults:
        print(fault)
    return 1 if outcome.faults or outcome.still_running else 0


if __name__ == "__main__":
    raise SystemExit(main())
