"""Hundreds of requests while nodes misbehave, die and come back and clients leave: nothing hangs, nothing is left."""

import asyncio
import collections
import random
import re

import aiohttp
import pytest

from tests.router.harness import Cluster, cluster, pairs_of, settings
from tests.router.stand_in_nodes import Fault

REQUESTS = 300
AT_ONCE = 32


async def one_request(it: Cluster, rng: random.Random) -> str:
    """Send one request of a random kind; returns how it ended."""
    stream = rng.random() < 0.5
    body = {
        "prompt": rng.choice(["a b c", [1, 2, 3], ["a", "b c"]]),
        "max_tokens": rng.choice([1, 2, 8, 8, 8, -1]),
        "n": rng.choice([1, 1, 1, 2]),
        "stream": stream,
    }
    patience_s = rng.choice([0.001, 0.01, 0.05]) if rng.random() < 0.25 else 20.0
    try:
        async with (
            asyncio.timeout(patience_s),
            it.client.post(f"{it.url}/v1/completions", json=body) as response,
        ):
            data = await response.read()
    except TimeoutError:
        assert patience_s < 20.0, "a request hung"
        return "left"
    if response.status != 200:
        assert response.status in (400, 500, 502, 503, 504), data
        assert b'"error"' in data
        return str(response.status)
    if stream:
        assert data.endswith(b"data: [DONE]\n\n"), data[-200:]
        if b'"error"' in data:
            return "stream broken"
        if isinstance(body["prompt"], str) and body["n"] == 1:
            words = re.findall(rb'"text":"w(\d+) "', data)
            assert [int(word) for word in words] == list(range(body["max_tokens"])), data
        return "stream"
    assert data.startswith(b"{")
    return "json"


async def mischief(it: Cluster, rng: random.Random) -> None:
    """Make nodes fail, now and then one of each role at most dies for a moment."""
    faults = [Fault.ERROR_500, Fault.FULL_503, Fault.CLOSE, Fault.CLOSE_IN_STREAM, Fault.ERROR_EVENT, Fault.LOSE_STATE]
    while True:
        await asyncio.sleep(rng.uniform(0.002, 0.01))
        node = rng.choice(it.nodes)
        if rng.random() < 0.9:
            if len(node.faults) < 2:
                node.faults.append(rng.choice(faults))
        elif rng.random() < 0.5:
            await node.die()
            await asyncio.sleep(rng.uniform(0.0, 0.1))
            await node.revive()
        else:
            node.break_connections()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dispatch", ["concurrent", "sequential"])
async def test_nothing_hangs_and_nothing_is_left_behind(seed, dispatch):
    rng = random.Random(f"{seed} {dispatch}")
    config = settings(requests={"dispatch": dispatch, "max_attempts": 4})
    timing = {"work_s": 0.004, "token_s": 0.001, "claim_wait_s": 0.3, "keepalive_s": 0.02}
    make = pairs_of(2, 3, ranks=2, notes=seed > 1, **timing)
    async with cluster(make, config) as it:
        troubles = asyncio.create_task(mischief(it, rng))
        ends: collections.Counter[str] = collections.Counter()
        slots = asyncio.Semaphore(AT_ONCE)

        async def limited() -> None:
            async with slots:
                ends[await one_request(it, rng)] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(REQUESTS):
                group.create_task(limited())
        troubles.cancel()
        await asyncio.gather(troubles, return_exceptions=True)
        await it.settle()
        table = it.service.transfers
        assert table.opened == table.finished + table.released
        assert sum(ends.values()) == REQUESTS
        assert ends["stream"] + ends["json"] > REQUESTS // 3, ends
        assert ends["left"], ends


async def test_clients_that_leave_at_random_points_free_both_nodes():
    rng = random.Random(7)
    async with cluster(pairs_of(1, 1, ranks=2, work_s=0.005, token_s=0.002)) as it:

        async def leave(num_times: int) -> None:
            for _ in range(num_times):
                body = {"prompt": "a b", "max_tokens": 20, "stream": rng.random() < 0.7}
                try:
                    async with (
                        asyncio.timeout(rng.uniform(0.0, 0.06)),
                        it.client.post(f"{it.url}/v1/completions", json=body) as response,
                    ):
                        await response.read()
                except (TimeoutError, aiohttp.ClientError):
                    pass

        await asyncio.gather(*(leave(50) for _ in range(4)))
        await it.settle()
        assert (await it.complete())[0] == 200
        await it.settle()
