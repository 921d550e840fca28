"""Health says whether the whole path was proven, by traffic or by the canary."""

import asyncio

from tests.router.harness import Cluster, cluster, pairs_of, settings
from tests.router.stand_in_nodes import Fault, StandInNode


async def health(it: Cluster) -> tuple[int, dict]:
    async with it.client.get(f"{it.url}/health") as response:
        return response.status, await response.json()


async def test_the_canary_proves_the_path_at_start_without_any_traffic():
    async with cluster(pairs_of(1, 1), settings(health={"canary": True})) as it:
        await it.until(lambda: it.service.proofs.healthy(it.service.clock()))
        status, report = await health(it)
        assert (status, report["status"]) == (200, "healthy")
        assert [(pair["prefill"], pair["decode"]) for pair in report["proven"]] == [("p0/0", "d0/0")]
        headers, body = it.decodes[0].seen[0]
        assert headers["x-request-id"].startswith("canary-")
        assert body["prompt"] == [1, 2, 3, 4]
        await it.settle()


async def test_every_rank_gets_a_canary_soon_after_it_joined():
    async with cluster(pairs_of(2, 2, ranks=2), settings(health={"canary": True})) as it:
        await it.until(lambda: not it.service.proofs.unproven())
        ranks = {(node.node_id, headers["x-data-parallel-rank"]) for node in it.nodes for headers, _ in node.seen}
        assert len(ranks) == 8
        assert sum(len(node.seen) for node in it.decodes) <= 6, "not every pair, every rank"
        await it.settle()


async def test_a_path_that_breaks_becomes_unhealthy_and_well_again():
    config = settings(health={"canary": True, "canary_interval_s": 0.05, "canary_timeout_s": 1.0})
    async with cluster(pairs_of(1, 1), config) as it:
        await it.until(lambda: it.service.proofs.healthy(it.service.clock()))
        it.prefills[0].faults.extend([Fault.ERROR_500] * 3)
        await it.until(lambda: not it.service.proofs.healthy(it.service.clock()))
        assert (await health(it))[0] == 503
        await it.until(lambda: it.service.proofs.healthy(it.service.clock()))
        await it.settle()


async def test_real_traffic_is_proof_and_spares_the_canary():
    config = settings(health={"canary": True, "canary_interval_s": 30.0})
    async with cluster(pairs_of(1, 1), config) as it:
        await it.until(lambda: it.service.proofs.healthy(it.service.clock()))
        canaries = len(it.decodes[0].seen)
        first = it.service.proofs.last
        assert (await it.complete())[0] == 200
        assert it.service.proofs.last > first
        await asyncio.sleep(0.1)
        assert len(it.decodes[0].seen) == canaries + 1


async def test_proof_dies_with_the_node_it_came_through():
    async with cluster(pairs_of(1, 1)) as it:
        assert (await it.complete())[0] == 200
        assert (await health(it))[0] == 200
        await it.decodes[0].leave()
        await it.until(lambda: it.service.registry.get("d0") is None)
        status, report = await health(it)
        assert (status, report["reason"]) == (503, "no pair of nodes is up")


async def test_health_is_unproven_before_anything_passed():
    async with cluster(pairs_of(1, 1)) as it:
        status, report = await health(it)
        assert (status, report["reason"], report["pairs"]) == (503, "no pair was proven recently", 1)


async def test_a_hanging_canary_times_out_and_leaves_nothing():
    config = settings(health={"canary": True, "canary_timeout_s": 0.2})
    async with cluster(pairs_of(1, 1), config) as it:
        await it.until(lambda: it.service.proofs.healthy(it.service.clock()))
        it.service.proofs._proven.clear()
        it.decodes[0].faults.append(Fault.HANG)
        it.service.canary._changed.set()
        await it.until(lambda: it.decodes[0].cancelled == 1)
        await it.until(lambda: it.service.proofs.healthy(it.service.clock()))
        await it.settle()


async def test_a_decode_node_alone_is_healthy_when_it_can_prefill():
    def make(world, routers):
        return [StandInNode(world, "decode", routers=routers, node_id="d0", local_prefill=True)]

    async with cluster(make, settings(health={"canary": True})) as it:
        await it.until(lambda: it.service.proofs.healthy(it.service.clock()))
        assert (await health(it))[1]["proven"][0]["prefill"] is None


async def test_an_answer_that_was_computed_again_proves_nothing_and_is_not_asked_for_in_a_rush():
    config = settings(health={"canary": True, "canary_interval_s": 0.2})
    async with cluster(pairs_of(1, 0), config) as it:
        decode = StandInNode(
            it.nodes[0].world, "decode", routers=(f"127.0.0.1:{it.service.cluster_port}",), node_id="d0"
        )
        decode.way = "recompute"
        async with decode:
            await it.until(lambda: len(decode.seen) >= 2)
            await asyncio.sleep(1.0)
            assert len(decode.seen) < 15
            assert (await health(it))[0] == 503
            decode.way = "handoff"
            await it.until(lambda: it.service.proofs.healthy(it.service.clock()))
