"""What a very long prompt does to the streams of others in the same API process.

    python -m benchmarks.long_prompt [--tokenizer DIR] [--tokens 393216] [--streams 64] [--seconds 10]

Streams get one token every 20 ms from an engine process without a model; their clients measure the gaps between events.
In the second half of the run, chats of about `--tokens` tokens arrive one after the other. `--tokenizer` is a folder
with the model's tokenizer.json; without it a small one is used, which takes one token per byte.
"""

import argparse
import asyncio
import multiprocessing
import random
import time
from itertools import pairwise

import aiohttp
import uvloop

from benchmarks.streaming_api import serve

PERIOD_S = 0.02
WORDS = ("the", "of", "and", "to", "in", "that", "is", "was", "for", "it", "with", "as", "his", "on", "be", "at", "by")


def long_text(num_tokens: int, bytes_per_token: float) -> str:
    """Words in random order, in lines, of about this many tokens."""
    dice = random.Random(0)
    words: list[str] = []
    size = 0
    while size < num_tokens * bytes_per_token:
        word = dice.choice(WORDS) + ("\n" if dice.random() < 0.1 else " ")
        words.append(word)
        size += len(word)
    return "".join(words)


async def stream(session: aiohttp.ClientSession, num_tokens: int, arrivals: list[float]) -> None:
    body = {"prompt": "hi", "max_tokens": num_tokens, "stream": True}
    async with session.post("/v1/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                arrivals.append(time.monotonic())  # noqa: PERF401 (others read the list meanwhile)


def gaps_ms(arrivals: list[list[float]], since: float, until: float) -> list[float]:
    """Sorted gaps between the events of each stream in a span of time."""
    return sorted(
        1e3 * (second - first)
        for times in arrivals
        for first, second in pairwise(times)
        if since <= first and second <= until
    )


async def measure(address: tuple[str, int], options: argparse.Namespace) -> None:
    text = long_text(options.tokens, 4.4 if options.tokenizer else 1.0)
    arrivals: list[list[float]] = [[] for _ in range(options.streams)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://{address[0]}:{address[1]}", connector=connector) as session:
        num_tokens = int(options.seconds / PERIOD_S)
        streams = [asyncio.create_task(stream(session, num_tokens, times)) for times in arrivals]
        await asyncio.sleep(1.0)
        began = time.monotonic()
        await asyncio.sleep(options.seconds / 2 - 1.0)
        middle = time.monotonic()
        prompts: list[int] = []
        took_s: list[float] = []
        while not any(task.done() for task in streams):
            sent = time.monotonic()
            # Each prompt differs from the first character on, so that no cache knows it.
            content = f"{len(prompts)} {text[len(prompts) :]}"
            long_chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            async with session.post("/v1/chat/completions", json=long_chat) as response:
                answer = await response.json()
            prompts.append(answer["usage"]["prompt_tokens"])
            took_s.append(time.monotonic() - sent)
        ended = min(times[-1] for times in arrivals)
        await asyncio.gather(*streams)
    print(f"{options.streams} streams; {len(prompts)} prompts of {prompts[0]} tokens, {min(took_s):.2f} s each at best")
    print(f"{'':>22} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}")
    for name, gaps in (
        ("gaps before", gaps_ms(arrivals, began, middle)),
        ("gaps beside prompts", gaps_ms(arrivals, middle, ended)),
    ):
        print(f"{name:>22} {gaps[len(gaps) // 2]:8.1f} {gaps[len(gaps) * 99 // 100]:8.1f} {gaps[-1]:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_prompt", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--tokenizer", metavar="DIR")
    parser.add_argument("--tokens", type=int, default=393_216)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, PERIOD_S, 1 << 22, options.tokenizer))
    server.start()
    theirs.close()
    try:
        uvloop.run(measure(ours.recv(), options))
    finally:
        ours.close()
        server.join(10)


if __name__ == "__main__":
    main()
