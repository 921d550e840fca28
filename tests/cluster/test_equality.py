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


def assert_same(got: list[Answer], expected: list[Answer]) -> None:
    for length, left, right in zip(LENGTHS, got, expected, strict=True):
        assert left.token_ids == right.token_ids, f"prompt of {length} tokens"
        assert left.logprobs == pytest.approx(right.logprobs, abs=1e-4), f"prompt of {length} tokens"
        assert left.finish_reason == right.finish_reason == "length"
        assert left.usage["prompt_tokens"] == right.usage["prompt_tokens"] == length
        assert left.usage["completion_tokens"] == len(left.token_ids)


@pytest.fixture(scope="module")
def workload() -> tuple[list[list[int]], list[int]]:
    rng = random.Random(3)
    return prompts_of_lengths(LENGTHS, seed=5), [rng.randint(1, 40) for _ in LENGTHS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, workload: tuple[list[list[int]], list[int]]
) -> AsyncIterator[list[Answer]]:
    async with standalone(tmp_path_factory.mktemp("alone"), tiny_checkpoint, PLAIN) as node:
        yield await complete_all(node.url, *workload, concurrency=1)


@pytest.mark.parametrize(
    ("prefill_tokens", "decode_pages", "steps"),
    [(512, "auto", {}), (37, 24, {"async_scheduling": "on", "cudagraph_capture_sizes": [2, 8]})],
    ids=["whole prompts", "odd chunks, preemption, steps ahead and padded"],
)
async def test_tokens_and_logprobs_equal_the_standalone_node(
    tmp_path: Path,
    tiny_checkpoint: Path,
    workload: tuple[list[list[int]], list[int]],
    expected: list[Answer],
    prefill_tokens: int,
    decode_pages: int | str,
    steps: dict[str, Any],
) -> None:
    cluster = Cluster(
        tmp_path,
        tiny_checkpoint,
        both=PLAIN,
        prefill=[{"engine": {"max_num_batched_tokens": prefill_tokens, "max_num_seqs": 8, **steps}}],
        decode=[{"engine": {"num_pages": decode_pages, **steps}}],
    )
    async with cluster:
        assert_same(await complete_all(cluster.url, *workload, concurrency=1), expected)
        assert_same(await complete_all(cluster.url, *workload, concurrency=32), expected)
        await cluster.wait_idle()
        (decode,) = await ranks(cluster.decode[0].url)
        assert decode["transfers_received"] >= 2 * len(LENGTHS)
        assert decode["transfers_failed"] == 0
        assert decode["recomputed"] == 0
        assert bool(decode["preemptions"]) == (decode_pages != "auto")
