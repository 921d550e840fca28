"""What a very long prompt does to the streams of others in the same API process.

    python -m benchmarks.long_prompt [--tokenizer DIR] [--tokens 393216] [--streams 64] [--seconds 10]

Streams get one token every 20 ms from an engine process without a model; their clients measure the gaps between events.
In the second half of the run, chats of about `--tokens` tokens arrive one after the other, none of them in any cache.
`--tokenizer` is a folder with the model's tokenizer.json, by default that of the packaged V4 tokenizer.
"""

import argparse
import asyncio
import multiprocessing
import random
import time
from http.client import HTTPConnection
from itertools import pairwise
from multiprocessing.connection import Connection

import aiohttp
import orjson
import uvloop

from benchmarks.streaming_api import process, serve
from benchmarks.text_workload import packaged_tokenizer

PERIOD_S = 0.02
WORDS = ("the", "of", "and", "to", "in", "that", "is", "was", "for", "it", "with", "as", "his", "on", "be", "at", "by")


JSON = {"Content-Type": "application/json"}
CHARS_PER_TOKEN = 3.2
"""Of the V4 tokenizer, for these words."""
NUM_TEXTS = 6
"""Together more than the tokenizer remembers."""


def long_text(num_tokens: int, seed: int = 0) -> str:
    """Words in random order, in lines, of about this many tokens."""
    dice = random.Random(seed)
    words: list[str] = []
    size = 0
    while size < num_tokens * CHARS_PER_TOKEN:
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


def send_prompts(parent: Connection, address: tuple[str, int], num_tokens: int) -> None:
    """A process that, once told to, sends long chats one after the other until it is told to stop.

    Tells when it is ready, and at the end how many tokens each had and how long each took.
    """
    bodies = [
        orjson.dumps({"messages": [{"role": "user", "content": long_text(num_tokens, seed)}], "max_tokens": 1})
        for seed in range(NUM_TEXTS)
    ]
    parent.send("ready")
    parent.recv()
    sent: list[tuple[int, float]] = []
    while not parent.poll():
        began = time.monotonic()
        connection = HTTPConnection(*address, timeout=60)
        connection.request("POST", "/v1/chat/completions", bodies[len(sent) % NUM_TEXTS], JSON)
        answer = orjson.loads(connection.getresponse().read())
        connection.close()
        sent.append((answer["usage"]["prompt_tokens"], time.monotonic() - began))
    parent.send(sent)


async def measure(address: tuple[str, int], sender: Connection, options: argparse.Namespace) -> None:
    arrivals: list[list[float]] = [[] for _ in range(options.streams)]
    connector = aiohttp.TCPConnector(limit=0)
    await asyncio.to_thread(sender.recv)
    async with aiohttp.ClientSession(f"http://{address[0]}:{address[1]}", connector=connector) as session:
        num_tokens = int(options.seconds / PERIOD_S)
        streams = [asyncio.create_task(stream(session, num_tokens, times)) for times in arrivals]
        await asyncio.sleep(1.0)
        began = time.monotonic()
        await asyncio.sleep(options.seconds / 2 - 1.0)
        middle = time.monotonic()
        sender.send("go")
        await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
        ended = min(times[-1] for times in arrivals)
        sender.send("stop")
        await asyncio.gather(*streams)
        prompts = await asyncio.to_thread(sender.recv)
    print(f"{options.streams} streams; {len(prompts)} prompts of {prompts[0][0]} tokens, "
          f"{min(took_s for _, took_s in prompts):.2f} s each at best")  # fmt: skip
    print(f"{'':>22} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}")
    for name, gaps in (
        ("gaps before", gaps_ms(arrivals, began, middle)),
        ("gaps beside prompts", gaps_ms(arrivals, middle, ended)),
    ):
        print(f"{name:>22} {gaps[len(gaps) // 2]:8.1f} {gaps[len(gaps) * 99 // 100]:8.1f} {gaps[-1]:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_prompt", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--tokenizer", metavar="DIR", default=str(packaged_tokenizer()))
    parser.add_argument("--tokens", type=int, default=393_216)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with process(serve, PERIOD_S, 1 << 22, options.tokenizer) as (address, _):
        ours, theirs = context.Pipe()
        sender = context.Process(target=send_prompts, args=(theirs, address, options.tokens))
        sender.start()
        uvloop.run(measure(address, ours, options))
        sender.join(10)


if __name__ == "__main__":
    main()
