"""Ranks that share the experts answer as one rank that has them all."""

import asyncio
import time
from pathlib import Path
from typing import Any

from tests.cluster.client import complete_all, prompts_of_lengths
from tests.cluster.harness import ranks, standalone, wait_idle

PLAIN: dict[str, Any] = {"engine": {"numerics": "plain", "dtype": "float32", "block_size": 32}}
LENGTHS = [1, 5, 16, 33, 64, 100]
MAX_TOKENS = [6, 1, 12, 3, 8, 10]


async def steps_of_all(url: str, size: int) -> int:
    """How many steps the ranks have made, once all of them say the same: their snapshots are not of one moment."""
    deadline = time.monotonic() + 30
    while True:
        steps = [rank["steps"] for rank in await ranks(url)]
        if len(steps) == size and len(set(steps)) == 1:
            return int(steps[0])
        assert time.monotonic() < deadline, f"the ranks did not step together: {steps}"
        await asyncio.sleep(0.1)


async def test_two_ranks_with_half_the_experts_each_give_the_tokens_of_one(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    prompts = prompts_of_lengths(LENGTHS, seed=23)
    (tmp_path / "one").mkdir()
    async with standalone(tmp_path / "one", tiny_checkpoint, PLAIN) as node:
        expected = await complete_all(node.url, prompts, MAX_TOKENS, concurrency=1)
    shared = PLAIN | {"data_parallel_size": 2, "enable_expert_parallel": True}
    async with standalone(tmp_path, tiny_checkpoint, shared) as node:
        alone = await complete_all(node.url, prompts, MAX_TOKENS, concurrency=1)
        together = await complete_all(node.url, prompts, MAX_TOKENS, concurrency=6)
        await wait_idle(node.url)
        steps = await steps_of_all(node.url, size=2)
        assert all(rank["generated_tokens"] for rank in await ranks(node.url)), "both ranks served requests"
        await asyncio.sleep(1.0)
        assert await steps_of_all(node.url, size=2) == steps, "nobody steps when all are idle"
    for answers in (alone, together):
        assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
        for got, wanted in zip(answers, expected, strict=True):
            assert max(abs(a - b) for a, b in zip(got.logprobs, wanted.logprobs, strict=True)) < 1e-4
