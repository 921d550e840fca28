"""A stream whose decode node fails in the middle goes on on another one; the client sees one unbroken stream."""

import asyncio
import re

import pytest

from tests.router.harness import Cluster, cluster, pairs_of, settings
from tests.router.stand_in_nodes import Fault, StandInNode


def words(data: bytes) -> list[int]:
    return [int(word) for word in re.findall(rb'"text":"w(\d+) "', data)]


async def resumes(it: Cluster) -> float:
    async with it.client.get(f"{it.url}/metrics") as response:
        text = await response.text()
    found = re.search(r"^tandem_router_resumes_total (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


async def test_a_stream_that_breaks_is_continued_where_it_broke():
    async with cluster(pairs_of(1, 2, notes=True)) as it:
        it.decodes[0].faults.append(Fault.CLOSE_IN_STREAM)
        status, data = await it.stream(max_tokens=9)
        assert status == 200
        assert words(data) == list(range(9))
        assert data.count(b"data: [DONE]") == 1
        assert not re.search(rb"error|half|whole|;t=", data)
        assert it.decodes[1].seen[0][1]["kv_transfer_params"]["resume"] == {"token_ids": [0, 1, 2, 3], "created": None}
        assert it.prefills[0].seen[1][1]["kv_transfer_params"]["resume"]["token_ids"] == [0, 1, 2, 3]
        assert await resumes(it) == 1
        await it.settle()


async def test_a_stream_may_break_several_times_up_to_the_bound():
    config = settings(requests={"max_resumes": 2})
    async with cluster(pairs_of(1, 2, notes=True), config) as it:
        for _ in range(2):
            for node in it.decodes:
                node.faults.append(Fault.CLOSE_IN_STREAM)
        status, data = await it.stream(max_tokens=20)
        assert status == 200
        assert words(data) == list(range(12))
        assert b"stream_broken" in data
        assert await resumes(it) == 2
        await it.settle()


async def test_the_same_node_may_continue_when_it_is_the_only_one():
    async with cluster(pairs_of(1, 1, notes=True)) as it:
        it.decodes[0].faults.append(Fault.CLOSE_IN_STREAM)
        _, data = await it.stream(max_tokens=8)
        assert words(data) == list(range(8))
        await it.settle()


async def test_a_node_that_dies_is_replaced_by_one_that_can_prefill_by_itself():
    def make(world, routers):
        return [
            StandInNode(world, "decode", routers=routers, node_id=f"d{i}", local_prefill=True, notes=True, token_s=0.02)
            for i in range(2)
        ]

    async with cluster(make) as it:
        asking = [asyncio.create_task(it.stream(max_tokens=12)) for _ in range(4)]
        await it.until(lambda: all(len(node.seen) == 2 for node in it.nodes))
        await asyncio.sleep(0.05)
        await it.decodes[0].die()
        for _, data in await asyncio.gather(*asking):
            assert words(data) == list(range(12))
            assert b"error" not in data
        assert await resumes(it) == 2
        assert it.decodes[1].seen[-1][1]["kv_transfer_params"].keys() == {"resume"}
        await it.settle()


async def test_a_silent_node_is_given_up_and_its_stream_continued():
    async with cluster(pairs_of(1, 2, notes=True), settings(deadlines={"idle_gap_s": 0.3})) as it:
        it.decodes[0].token_s = 3600.0
        _, data = await it.stream(max_tokens=5)
        assert words(data) == list(range(5))
        await it.settle()


async def test_an_answer_that_is_all_there_is_not_asked_for_again():
    async with cluster(pairs_of(1, 2, notes=True)) as it:
        it.decodes[0].faults.append(Fault.CLOSE_AFTER_STREAM)
        status, data = await it.stream(max_tokens=5)
        assert status == 200
        assert words(data) == list(range(5))
        assert data.count(b"data: [DONE]") == 1
        assert len(it.decodes[1].seen) == 0
        await it.settle()


async def test_when_no_node_can_continue_the_stream_ends_with_an_error():
    config = settings(requests={"wait_for_node_s": 0.1})
    async with cluster(pairs_of(1, 1, notes=True, token_s=0.02), config) as it:
        asking = asyncio.create_task(it.stream(max_tokens=50))
        await it.until(lambda: it.decodes[0].seen)
        await asyncio.sleep(0.1)
        await it.decodes[0].die()
        _, data = await asking
        assert words(data) == list(range(len(words(data))))
        assert b'"code":"no_nodes"' in data
        assert data.endswith(b"data: [DONE]\n\n")
        await it.settle()


@pytest.mark.parametrize("body", [{"n": 2}, {"prompt": ["a", "b"]}])
async def test_several_choices_are_not_resumed(body):
    async with cluster(pairs_of(1, 2, notes=True)) as it:
        it.decodes[0].faults.append(Fault.CLOSE_IN_STREAM)
        _, data = await it.stream(max_tokens=6, **body)
        assert b"stream_broken" in data
        assert "x-tandem-resumable" not in it.decodes[0].seen[0][0]
        await it.settle()


async def test_the_bound_may_be_zero():
    async with cluster(pairs_of(1, 2, notes=True), settings(requests={"max_resumes": 0})) as it:
        it.decodes[0].faults.append(Fault.CLOSE_IN_STREAM)
        assert b"stream_broken" in (await it.stream(max_tokens=6))[1]
        await it.settle()
