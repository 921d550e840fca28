"""What the cluster tests ask of an HTTP server, as a client would."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    usage: dict[str, Any]


def prompts_of_lengths(lengths: Sequence[int], seed: int, vocab: int = 900) -> list[list[int]]:
    """Random prompts of ordinary tokens (the tiny tokenizer's special ids lie above and at 0..2)."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


async def complete(
    session: aiohttp.ClientSession, url: str, prompt: Sequence[int], max_tokens: int, **fields: Any
) -> Answer:
    body = {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    async with session.post(f"{url}/v1/completions", json=body | fields) as response:
        answer = await response.json()
        assert response.status == 200, answer
    choice = answer["choices"][0]
    return Answer(
        token_ids=choice["token_ids"],
        logprobs=choice["logprobs"]["token_logprobs"],
        finish_reason=choice["finish_reason"],
        usage=answer["usage"],
    )


async def complete_all(
    url: str, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], concurrency: int, **fields: Any
) -> list[Answer]:
    """Every prompt, `concurrency` at a time, in order of start."""
    gate = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=120), connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def one(prompt: Sequence[int], tokens: int) -> Answer:
            async with gate:
                return await complete(session, url, prompt, tokens, **fields)

        return await asyncio.gather(*(one(p, n) for p, n in zip(prompts, max_tokens, strict=True)))
