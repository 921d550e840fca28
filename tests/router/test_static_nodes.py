"""Nodes that do not register: Tandem's, and vLLM's as the wire protocol describes them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from router.service import RouterService
from tests.router.harness import Cluster, settings
from tests.router.stand_in_nodes import Fault, StandInNode, World, many
from tests.router.stand_in_vllm import MODEL, StandInVllm, VllmWorld


@contextlib.asynccontextmanager
async def listed(running_nodes: list[Any], **options: Any) -> AsyncIterator[Cluster]:
    """A router that has these running nodes in its lists and takes no registrations."""
    sections = {
        "prefill": [
            {"url": node.url, "bootstrap_port": getattr(node, "bootstrap_port", None)}
            for node in running_nodes
            if node.role == "prefill"
        ],
        "decode": [{"url": node.url} for node in running_nodes if node.role == "decode"],
        "poll_s": 0.05,
        "poll_timeout_s": 1.0,
        **options.pop("nodes", {}),
    }
    service = RouterService(settings(cluster={"port": None}, nodes=sections, **options))
    stopping, started = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(service.run(stopping, lambda _: started.set()))
    await started.wait()
    try:
        async with aiohttp.ClientSession() as client:
            yield Cluster(service, running_nodes, client)
    finally:
        stopping.set()
        await running


def pair() -> list[StandInNode]:
    world = World()
    return [StandInNode(world, "prefill", node_id="p0"), StandInNode(world, "decode", node_id="d0")]


def ready(it: Cluster, count: int) -> bool:
    return sum(node.usable for node in it.service.registry.nodes) == count


async def test_listed_tandem_nodes_serve_and_are_told_releases():
    async with many(pair()) as nodes, listed(nodes) as it:
        await it.until(lambda: ready(it, 2))
        assert (await it.complete())[0] == 200
        it.decodes[0].faults.append(Fault.BAD_400)
        assert (await it.complete())[0] == 400
        await it.until(lambda: it.prefills[0].released and it.decodes[0].released)
        await it.settle()


async def test_a_listed_node_that_goes_away_is_lost_and_found_again():
    async with many(pair()) as nodes, listed(nodes) as it:
        await it.until(lambda: ready(it, 2))
        await it.decodes[0].refuse()
        await it.until(lambda: ready(it, 1))
        assert (await it.complete())[0] == 503
        await it.decodes[0].listen()
        await it.until(lambda: ready(it, 2))
        assert (await it.complete())[0] == 200


async def test_a_listed_nodes_new_epoch_is_used():
    async with many(pair()) as nodes, listed(nodes) as it:
        await it.until(lambda: ready(it, 2))
        new = nodes[0].membership.join.ranks[0].epoch = nodes[0].states[0].epoch = "e" * 32
        await it.until(lambda: it.service.registry.get("p0").targets[0].info.epoch == new)
        assert (await it.complete())[0] == 200


async def test_a_node_listed_under_the_wrong_role_is_named():
    nodes = pair()
    async with many(nodes):
        url = nodes[1].url
        async with listed(nodes, nodes={"prefill": [{"url": url}]}) as it:
            await asyncio.sleep(0.2)
            assert not [node for node in it.service.registry.nodes if node.info.role.value == "prefill"]


@contextlib.asynccontextmanager
async def vllm(ranks: int = 1, **options: Any) -> AsyncIterator[tuple[Cluster, StandInVllm, StandInVllm]]:
    world = VllmWorld()
    prefill, decode = StandInVllm(world, "prefill", ranks=ranks), StandInVllm(world, "decode", ranks=ranks)
    async with prefill, decode:
        node_options = {"dialect": "vllm", **options.pop("nodes", {})}
        async with listed([prefill, decode], nodes=node_options, **options) as it:
            await it.until(lambda: ready(it, 2))
            yield it, prefill, decode


async def test_vllm_nodes_get_the_bodies_of_the_protocol():
    async with vllm() as (it, prefill, decode):
        body = {"max_tokens": 9, "stream_options": {"include_usage": True}, "vllm_xargs": {"a": 1}, "min_tokens": 4}
        status, _ = await it.stream(**body)
        assert status == 200
        (prefill_headers, sent), (decode_headers, received) = prefill.seen[0], decode.seen[0]
        transfer_id = sent["kv_transfer_params"]["transfer_id"]
        assert sent == {
            "prompt": "a b c",
            "stream": False,
            "max_tokens": 1,
            "min_tokens": 1,
            "vllm_xargs": {"a": 1},
            "kv_transfer_params": {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "transfer_id": transfer_id,
            },
        }
        assert received == {
            "prompt": "a b c",
            "stream": True,
            **body,
            "kv_transfer_params": {
                "do_remote_decode": False,
                "do_remote_prefill": True,
                "transfer_id": transfer_id,
                "remote_bootstrap_addr": f"http://127.0.0.1:{prefill.bootstrap_port}",
                "remote_engine_id": "engine0_dp0",
            },
        }
        assert "x-data-parallel-rank" not in prefill_headers
        assert prefill_headers["x-request-id"] == decode_headers["x-request-id"]
        assert not prefill.world.held


async def test_vllm_ranks_come_from_metrics_and_get_their_own_engine_ids():
    async with vllm(ranks=4) as (it, prefill, decode):
        for _ in range(4):
            assert (await it.complete())[0] == 200
        assert [headers["x-data-parallel-rank"] for headers, _ in prefill.seen] == ["0", "1", "2", "3"]
        engines = [body["kv_transfer_params"]["remote_engine_id"] for _, body in decode.seen]
        assert engines == [f"engine0_dp{rank}" for rank in range(4)]


async def test_usage_comes_from_where_the_prompt_was_prefilled():
    async with vllm() as (it, _, _):
        usage = (await it.complete())[1]["usage"]
        assert (usage["prompt_tokens"], usage["total_tokens"]) == (7, 9)
        assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
        _, data = await it.stream()
        event = json.loads(data.split(b"\n\n")[-3].removeprefix(b"data: "))
        assert event["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_a_table_that_lacks_a_rank_keeps_the_node_out():
    world = VllmWorld()
    prefill, decode = StandInVllm(world, "prefill", ranks=2), StandInVllm(world, "decode", ranks=2)
    prefill.missing_ranks = {1}
    async with prefill, decode, listed([prefill, decode], nodes={"dialect": "vllm"}) as it:
        await it.until(lambda: prefill.queries >= 2)
        assert ready(it, 1)
        prefill.missing_ranks = set()
        await it.until(lambda: ready(it, 2))
        assert (await it.complete())[0] == 200


async def test_a_restarted_prefill_is_asked_for_its_new_ids_after_the_first_load_failure():
    async with vllm(requests={"max_attempts": 5, "retry_backoff_s": 0.1}) as (it, prefill, decode):
        assert (await it.complete())[0] == 200
        prefill.restart()
        assert (await it.complete())[0] == 200
        assert decode.seen[-1][1]["kv_transfer_params"]["remote_engine_id"] == "engine1_dp0"


async def test_an_old_table_is_asked_again():
    async with vllm(nodes={"table_age_s": 0.1}) as (it, prefill, _):
        await it.until(lambda: prefill.queries >= 3)
        assert ready(it, 2)


async def test_state_that_nobody_fetches_is_released_through_a_refused_decode_request():
    async with vllm(requests={"max_attempts": 1}) as (it, prefill, decode):
        decode.statuses.append(500)
        assert (await it.complete())[0] == 502
        await it.until(lambda: not prefill.world.held)
        release = decode.seen[-1][1]
        assert release["model"] != MODEL
        assert release["kv_transfer_params"]["remote_engine_id"] == "engine0_dp0"


async def test_vllm_decode_serves_alone_while_no_prefill_is_up():
    world = VllmWorld()
    decode = StandInVllm(world, "decode")
    async with decode, listed([decode], nodes={"dialect": "vllm"}) as it:
        await it.until(lambda: ready(it, 1))
        assert (await it.complete())[1]["choices"][0]["text"] == "hello world"
        assert "kv_transfer_params" not in decode.seen[0][1]
