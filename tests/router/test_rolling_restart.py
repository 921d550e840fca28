"""Nodes drain, leave and come back as new incarnations under load: no request fails, none is even tried twice."""

import asyncio

import pytest

from tests.router.harness import Cluster, cluster, pairs_of, settings
from tests.router.stand_in_nodes import StandInNode


async def restart(it: Cluster, node: StandInNode) -> None:
    """As an operator would: drain, wait, stop, start."""
    node.membership.drain()
    registry = it.service.registry
    await it.until(lambda: registry.get(node.node_id).draining and not registry.get(node.node_id).calls)
    await it.until(lambda: not node.held and not node.running)
    await node.die()
    await it.until(lambda: registry.get(node.node_id) is None)
    await node.revive()
    await it.until(lambda: registry.get(node.node_id) is not None and registry.get(node.node_id).usable)


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded"])
async def test_a_rolling_restart_of_every_node_is_not_noticed(policy):
    config = settings(requests={"prefill_policy": policy, "decode_policy": policy, "max_attempts": 1})
    async with cluster(pairs_of(2, 3, ranks=2, work_s=0.005, token_s=0.002), config) as it:
        stop = False
        served = 0

        async def client(number: int) -> None:
            nonlocal served
            while not stop:
                if number % 2:
                    status, data = await it.stream(max_tokens=5)
                    assert data.endswith(b"[DONE]\n\n")
                    assert b'"error"' not in data
                else:
                    status, _ = await it.complete(max_tokens=5)
                assert status == 200
                served += 1

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        for node in [*it.nodes, *it.nodes]:
            await restart(it, node)
        stop = True
        await asyncio.gather(*clients)
        await it.settle()
        assert served > 20
        table = it.service.transfers
        assert (table.finished, table.released) == (table.opened, 0)
        assert all(node.cancelled == 0 for node in it.nodes)
