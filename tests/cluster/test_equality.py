"""Through router, prefill node, Mooncake and decode node the tokens are those of one process."""

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.cluster.client import Answer, complete_all, prompts_of_lengths
from tests.cluster.harness import Cluster, ranks, standalone

# Float32 without quantisation: what differs is then only the order of additions, so that logprobs can be compared.
PLAIN: dict[str, Any] = {"engine": {"numerics": "plain", "dtype": "float32", "block_size": 32}}
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 131, 200, 255, 256, 257, 300]
LENGTHS += [12, 45, 77, 150, 222, 290]
FEW_PAGES = 24
CROWD, CROWD_TOKENS = 8, 110
"""Requests that fit with a page each, and need five of them, 40 together, before the first has ended."""

Workload = tuple[list[list[int]], list[int]]


def assert_same(workload: Workload, got: list[Answer], expected: list[Answer]) -> None:
    for prompt, left, right in zip(workload[0], got, expected, strict=True):
        length = len(prompt)
        assert left.token_ids == right.token_ids, f"prompt of {length} tokens"
        assert left.logprobs == pytest.approx(right.logprobs, abs=1e-4), f"prompt of {length} tokens"
        assert left.finish_reason == right.finish_reason == "length"
        assert left.usage["prompt_tokens"] == right.usage["prompt_tokens"] == length
        assert left.usage["completion_tokens"] == len(left.token_ids)


@pytest.fixture(scope="module")
def workload() -> Workload:
    rng = random.Random(3)
    return prompts_of_lengths(LENGTHS, seed=5), [rng.randint(1, 24) for _ in LENGTHS]


@pytest.fixture(scope="module")
def crowd() -> Workload:
    return prompts_of_lengths([20] * CROWD, seed=6), [CROWD_TOKENS] * CROWD


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(
    small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, workload: Workload, crowd: Workload
) -> AsyncIterator[tuple[list[Answer], list[Answer]]]:
    async with standalone(tmp_path_factory.mktemp("alone"), small_checkpoint, PLAIN) as node:
        yield (
            await complete_all(node.url, *workload, concurrency=1),
            await complete_all(node.url, *crowd, concurrency=CROWD),
        )


@pytest.mark.parametrize(
    ("prefill_tokens", "decode_pages", "steps"),
    [(512, "auto", {}), (37, FEW_PAGES, {"async_scheduling": "on", "cudagraph_capture_sizes": [2, 8]})],
    ids=["whole prompts", "odd chunks, preemption, steps ahead and padded"],
)
async def test_tokens_and_logprobs_equal_the_standalone_node(
    tmp_path: Path,
    small_checkpoint: Path,
    workload: Workload,
    crowd: Workload,
    expected: tuple[list[Answer], list[Answer]],
    prefill_tokens: int,
    decode_pages: int | str,
    steps: dict[str, Any],
) -> None:
    cluster = Cluster(
        tmp_path,
        small_checkpoint,
        both=PLAIN,
        prefill=[{"engine": {"max_num_batched_tokens": prefill_tokens, "max_num_seqs": 8, **steps}}],
        decode=[{"engine": {"num_pages": decode_pages, **steps}}],
    )
    async with cluster:
        assert_same(workload, await complete_all(cluster.url, *workload, concurrency=1), expected[0])
        assert_same(workload, await complete_all(cluster.url, *workload, concurrency=32), expected[0])
        assert_same(crowd, await complete_all(cluster.url, *crowd, concurrency=CROWD), expected[1])
        await cluster.wait_idle()
        (decode,) = await ranks(cluster.decode[0].url)
        assert decode["transfers_received"] >= 2 * len(LENGTHS)
        assert decode["transfers_failed"] == 0
        assert decode["recomputed"] == 0
        assert bool(decode["preemptions"]) == (decode_pages != "auto")
