"""What clients see, and what nodes keep, when legs fail."""

import asyncio
import json

import aiohttp
import pytest

from tests.router.harness import cluster, pairs_of, settings
from tests.router.stand_in_nodes import Fault, StandInNode

UNSEEN = [Fault.ERROR_500, Fault.FULL_503, Fault.CLOSE]


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("fault", UNSEEN)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_leg_that_fails_once_is_not_seen_by_the_client(role, fault, stream):
    async with cluster(pairs_of(2, 2)) as it:
        failing = it.prefills[0] if role == "prefill" else it.decodes[0]
        failing.faults.append(fault)
        status, answer = await (it.stream() if stream else it.complete())
        assert status == 200
        assert b"[DONE]" in answer if stream else answer["choices"]
        assert len(failing.seen) == 1
        await it.settle()


@pytest.mark.parametrize("fault", [Fault.FULL_503, Fault.CLOSE])
async def test_another_decode_rank_takes_over_the_same_transfer(fault):
    async with cluster(pairs_of(1, 2, work_s=0.05)) as it:
        it.decodes[0].faults.append(fault)
        assert (await it.complete())[0] == 200
        assert len(it.prefills[0].seen) == 1, "the prompt was computed once"
        transfers = [node.seen[0][1]["kv_transfer_params"]["transfer_id"] for node in it.nodes]
        assert len(set(transfers)) == 1
        await it.settle()
        assert it.service.transfers.released == 0


async def test_a_prefill_failure_makes_a_new_transfer_and_releases_the_old_one():
    async with cluster(pairs_of(2, 1)) as it:
        it.prefills[0].faults.append(Fault.ERROR_500)
        assert (await it.complete())[0] == 200
        first = it.prefills[0].seen[0][1]["kv_transfer_params"]["transfer_id"]
        second = it.prefills[1].seen[0][1]["kv_transfer_params"]["transfer_id"]
        assert first != second
        await it.until(lambda: it.decodes[0].released == [first] and it.prefills[0].released == [first])
        assert it.prefills[1].released == []
        await it.settle()


async def test_alone_and_alive_the_same_prefill_is_asked_again():
    async with cluster(pairs_of(1, 1)) as it:
        it.prefills[0].faults.extend([Fault.ERROR_500, Fault.CLOSE])
        assert (await it.complete())[0] == 200
        assert len(it.prefills[0].seen) == 3
        await it.settle()


async def test_state_that_was_lost_is_computed_again():
    async with cluster(pairs_of(2, 1, claim_wait_s=0.1)) as it:
        it.prefills[0].faults.append(Fault.LOSE_STATE)
        assert (await it.complete())[0] == 200
        assert len(it.prefills[1].seen) == 1
        await it.settle()


async def test_attempts_are_bounded():
    async with cluster(pairs_of(1, 1), settings(requests={"max_attempts": 2})) as it:
        it.prefills[0].faults.extend([Fault.ERROR_500] * 5)
        status, body = await it.complete()
        assert (status, body["error"]["code"]) == (502, "upstream_failed")
        assert len(it.prefills[0].seen) == 2
        await it.settle()


async def test_under_fail_policy_work_that_was_begun_is_not_repeated():
    config = settings(requests={"kv_load_failure_policy": "fail"})
    async with cluster(pairs_of(2, 2), config) as it:
        it.prefills[0].faults.append(Fault.ERROR_500)
        assert (await it.complete())[0] == 502
        assert sum(len(node.seen) for node in it.prefills) == 1
        it.prefills[1].faults.append(Fault.FULL_503)
        assert (await it.complete())[0] == 200
        await it.settle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_4xx_is_passed_on_at_once_and_the_other_leg_is_cancelled(role):
    async with cluster(pairs_of(2, 2)) as it:
        refusing, other = (it.prefills[0], it.decodes[0])[:: 1 if role == "prefill" else -1]
        refusing.faults.append(Fault.BAD_400)
        other.faults.append(Fault.HANG)
        status, body = await it.complete()
        assert (status, body["error"]["message"]) == (400, "max_tokens: must be positive")
        await it.until(lambda: other.cancelled == 1)
        await it.until(lambda: other.released)
        await it.settle()


async def test_every_decode_node_full_is_503_with_retry_after():
    async with cluster(pairs_of(1, 2)) as it:
        for node in it.decodes:
            node.faults.extend([Fault.FULL_503] * 3)
        async with it.client.post(f"{it.url}/v1/completions", json={"prompt": "a"}) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "7"
        await it.settle()


async def test_no_node_is_503_with_retry_after_and_the_router_stays_well():
    async with (
        cluster(pairs_of(0, 0)) as it,
        it.client.post(f"{it.url}/v1/completions", json={"prompt": "a"}) as response,
    ):
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert (await response.json())["error"]["code"] == "no_nodes"


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("how", ["die", "fall_silent"])
async def test_a_node_that_dies_before_the_first_token_is_not_noticed(role, how):
    async with cluster(pairs_of(2, 2)) as it:
        dying = it.prefills[0] if role == "prefill" else it.decodes[0]
        dying.faults.append(Fault.HANG)
        asking = asyncio.create_task(it.complete())
        await it.until(lambda: dying.seen)
        if how == "die":
            await dying.die()
        else:
            await dying.leave()
        assert (await asyncio.wait_for(asking, 2.0))[0] == 200
        await it.settle()


async def test_without_prefill_nodes_a_decode_node_that_can_computes_alone():
    def make(world, routers):
        return [StandInNode(world, "decode", routers=routers, local_prefill=True)]

    async with cluster(make) as it:
        assert (await it.complete())[0] == 200
        assert "kv_transfer_params" not in it.decodes[0].seen[0][1]
        assert it.service.transfers.opened == 0
        await it.settle()


async def test_the_fallback_can_be_switched_off():
    def make(world, routers):
        return [StandInNode(world, "decode", routers=routers, local_prefill=True)]

    async with cluster(make, settings(requests={"local_prefill_fallback": False})) as it:
        assert (await it.complete())[0] == 503


async def test_a_stream_that_breaks_ends_with_an_error_event_after_whole_events():
    async with cluster(pairs_of(1, 1)) as it:
        it.decodes[0].faults.append(Fault.CLOSE_IN_STREAM)
        status, data = await it.stream(max_tokens=6)
        assert status == 200
        events = data.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        error = json.loads(events[-3].removeprefix(b"data: "))
        assert error["error"]["code"] == "stream_broken"
        for event in events[:-3]:
            assert json.loads(event.removeprefix(b"data: "))["choices"]
        await it.settle()


async def test_a_json_answer_that_breaks_off_is_asked_for_again():
    async with cluster(pairs_of(1, 2)) as it:
        it.decodes[0].faults.append(Fault.CLOSE_IN_STREAM)
        status, body = await it.complete()
        assert (status, body["choices"][0]["text"]) == (200, "w0 w1 w2 w3 ")
        await it.settle()


async def test_an_error_as_the_first_event_is_not_shown_to_the_client():
    async with cluster(pairs_of(1, 2)) as it:
        it.decodes[0].faults.append(Fault.ERROR_EVENT)
        status, data = await it.stream()
        assert status == 200
        assert b"error" not in data
        await it.settle()


async def test_keep_alives_reach_the_client_and_failover_still_works_after_them():
    config = settings()
    async with cluster(pairs_of(2, 2, work_s=0.3, keepalive_s=0.05), config) as it:
        asking = asyncio.create_task(it.stream(max_tokens=2))
        await it.until(lambda: it.prefills[0].seen)
        await asyncio.sleep(0.15)
        await it.prefills[0].die()
        status, data = await asking
        assert status == 200
        assert data.startswith(b": keep-alive\n\n")
        assert data.count(b'"role":"assistant"') == 1
        assert data.count(b'"text":"w') == 2
        assert b"error" not in data
        await it.settle()


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_deadline_gives_504_and_frees_both_nodes(leg):
    deadlines = {"prefill_s": 0.3} if leg == "prefill" else {"first_byte_s": 0.3}
    async with cluster(pairs_of(1, 1), settings(deadlines=deadlines)) as it:
        (it.prefills if leg == "prefill" else it.decodes)[0].faults.append(Fault.HANG)
        status, body = await it.complete()
        assert (status, body["error"]["code"]) == (504, "upstream_timeout")
        await it.until(lambda: all(node.released for node in it.nodes))
        await it.settle()


async def test_a_silent_stream_ends_after_the_idle_gap():
    async with cluster(pairs_of(1, 1, token_s=5.0), settings(deadlines={"idle_gap_s": 0.3})) as it:
        status, data = await it.stream()
        assert status == 200
        assert b"stream_broken" in data
        await it.settle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_both_legs_and_releases_the_transfer(stream):
    async with cluster(pairs_of(1, 1, work_s=10.0)) as it:
        asking = asyncio.create_task(it.stream() if stream else it.complete())
        await it.until(lambda: all(node.running for node in it.nodes))
        asking.cancel()
        await it.until(lambda: it.prefills[0].cancelled == 1 and it.decodes[0].cancelled == 1)
        await it.until(lambda: all(len(node.released) == 1 for node in it.nodes))
        await it.settle()


async def test_a_client_that_leaves_in_mid_stream_stops_the_decode_node():
    async with cluster(pairs_of(1, 1, token_s=0.02)) as it:
        async with it.client.post(
            f"{it.url}/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 10_000}
        ) as response:
            await response.content.readany()
            response.close()
        await it.until(lambda: it.decodes[0].cancelled == 1)
        await it.settle()
        assert it.service.transfers.finished == 1


async def test_a_stream_outlives_the_loss_of_its_nodes_heartbeat():
    async with cluster(pairs_of(1, 1, token_s=0.05)) as it:
        asking = asyncio.create_task(it.stream(max_tokens=10))
        await it.until(lambda: it.service.transfers.finished)
        await it.decodes[0].leave()
        status, data = await asking
        assert status == 200
        assert data.count(b'"text":"w') == 10
        assert b"error" not in data
        await it.settle()


async def test_a_restarted_node_is_used_under_its_new_epoch():
    async with cluster(pairs_of(1, 1)) as it:
        assert (await it.complete())[0] == 200
        prefill = it.prefills[0]
        old = prefill.states[0].epoch
        await prefill.die()
        await prefill.revive()
        await it.until(lambda: prefill.membership.attached)
        assert (await it.complete())[0] == 200
        assert it.decodes[0].seen[-1][1]["kv_transfer_params"]["remote_epoch"] == prefill.states[0].epoch != old
        await it.settle()


async def test_a_draining_node_gets_no_new_work_and_finishes_what_it_has():
    async with cluster(pairs_of(1, 2, token_s=0.05)) as it:
        asking = asyncio.create_task(it.stream(max_tokens=8))
        await it.until(lambda: it.decodes[0].running)
        it.decodes[0].membership.drain()
        await it.until(lambda: it.service.registry.get("d0").draining)
        for _ in range(4):
            assert (await it.complete())[0] == 200
        assert len(it.decodes[0].seen) == 1
        assert (await asking)[1].endswith(b"data: [DONE]\n\n")
        await it.settle()


async def test_a_refused_connection_goes_elsewhere_and_the_node_is_avoided_for_a_while():
    async with cluster(pairs_of(1, 2)) as it:
        await it.decodes[0].refuse()
        for _ in range(4):
            assert (await it.complete())[0] == 200
        assert len(it.decodes[1].seen) == 4
        assert it.service.metrics.retries.labels("decode", "other_decode")._value.get() == 1
        await it.settle()


async def test_shutting_down_lets_running_streams_finish():
    async with cluster(pairs_of(1, 1, token_s=0.05)) as it:
        asking = asyncio.create_task(it.stream(max_tokens=8))
        await it.until(lambda: it.service.transfers.finished)
        it.stopping.set()
        status, data = await asking
        assert status == 200
        assert data.count(b'"text":"w') == 8
        with pytest.raises(aiohttp.ClientConnectionError):
            await it.complete()


async def test_a_node_whose_stream_broke_learns_what_was_released_when_it_is_back():
    async with cluster(pairs_of(1, 1, work_s=0.05)) as it:
        prefill, decode = it.nodes
        decode.faults.append(Fault.HANG)
        asking = asyncio.create_task(it.complete())
        await it.until(lambda: prefill.held)
        await prefill.leave()
        asking.cancel()
        await it.until(lambda: decode.cancelled)
        assert not prefill.released
        prefill.rejoin()
        await it.until(lambda: prefill.released == decode.released)
        await it.settle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_whose_only_node_restarts_waits_for_it(role):
    async with cluster(pairs_of(1, 1)) as it:
        node = it.prefills[0] if role == "prefill" else it.decodes[0]
        node.faults.append(Fault.HANG)
        asking = asyncio.create_task(it.complete())
        await it.until(lambda: node.seen)
        await node.die()
        await it.until(lambda: it.service.registry.get(node.node_id) is None)
        await asyncio.sleep(0.1)
        await node.revive()
        assert (await asking)[0] == 200
        await it.settle()


async def test_a_request_whose_only_node_stays_away_is_503_in_the_end():
    async with cluster(pairs_of(1, 1), settings(requests={"wait_for_node_s": 0.2})) as it:
        it.decodes[0].faults.append(Fault.HANG)
        asking = asyncio.create_task(it.complete())
        await it.until(lambda: it.decodes[0].seen)
        await it.decodes[0].die()
        assert (await asking)[0] == 503
        await it.settle()


async def test_a_node_that_serves_alone_among_pairs_gets_whole_requests():
    def make(world, routers):
        pairs = pairs_of(1, 1)(world, routers)
        alone = StandInNode(world, "decode", routers=routers, node_id="d9", local_prefill=True, receives=False)
        return [*pairs, alone]

    async with cluster(make) as it:
        for _ in range(4):
            assert (await it.complete())[0] == 200
        pair, alone = it.decodes
        assert [body.get("kv_transfer_params") for _, body in alone.seen] == [None, None]
        assert all("kv_transfer_params" in body for _, body in pair.seen)
        # A claim that its node cannot keep goes to no node that could not take it over.
        pair.faults.append(Fault.CLOSE)
        assert (await it.complete())[0] == 200
        assert all("kv_transfer_params" not in body for _, body in alone.seen)
        await it.settle()
