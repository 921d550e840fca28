"""Requests through a real router and stand-in nodes: the way it goes when nothing fails."""

import asyncio

import pytest

from tests.router.harness import cluster, pairs_of, settings


async def test_a_completion_takes_both_legs_and_answers_with_decodes_body():
    async with cluster(pairs_of(1, 1)) as it:
        status, body = await it.complete(max_tokens=3)
        assert (status, body["choices"][0]["text"]) == (200, "w0 w1 w2 ")
        (prefill_headers, prefill), (decode_headers, decode) = it.prefills[0].seen[0], it.decodes[0].seen[0]
        sent, received = prefill["kv_transfer_params"], decode["kv_transfer_params"]
        assert sent["do_remote_decode"] is True
        assert received["do_remote_prefill"] is True
        assert sent["transfer_id"] == received["transfer_id"]
        assert len(sent["transfer_id"]) == 32
        assert received["remote_address"] == it.prefills[0].addresses[0]
        assert received["remote_epoch"] == it.prefills[0].states[0].epoch
        assert prefill_headers["x-request-id"] == decode_headers["x-request-id"]
        await it.settle()
        assert it.service.transfers.finished == 1


async def test_a_stream_comes_through_byte_for_byte():
    async with cluster(pairs_of(1, 1)) as it:
        status, data = await it.stream(max_tokens=3)
        assert status == 200
        words = [line for line in data.split(b"\n\n") if b'"text":"w' in line]
        assert len(words) == 3
        assert data.endswith(b"data: [DONE]\n\n")
        await it.settle()


async def test_round_robin_pairs_ranks_in_lock_step():
    async with cluster(pairs_of(2, 2, ranks=2)) as it:
        for _ in range(8):
            await it.complete()
        for node in it.nodes:
            assert [headers["x-data-parallel-rank"] for headers, _ in node.seen] == ["0", "1", "0", "1"]
        for prefill, decode in zip(it.prefills, it.decodes, strict=True):
            assert [body["kv_transfer_params"]["transfer_id"] for _, body in prefill.seen] == [
                body["kv_transfer_params"]["transfer_id"] for _, body in decode.seen
            ]
        await it.settle()


async def test_sequential_dispatch_sends_decode_after_prefill_answered():
    async with cluster(pairs_of(1, 1, work_s=0.1), settings(requests={"dispatch": "sequential"})) as it:
        asking = asyncio.create_task(it.complete())
        await it.until(lambda: it.prefills[0].seen)
        await asyncio.sleep(0.03)
        assert not it.decodes[0].seen
        assert (await asking)[0] == 200
        await it.settle()


async def test_every_choice_of_a_request_is_a_transfer_of_its_own():
    async with cluster(pairs_of(1, 1)) as it:
        status, _ = await it.complete(n=2, prompt=["a b", "c"])
        assert status == 200
        await it.settle()


@pytest.mark.parametrize("stream", [False, True])
async def test_many_requests_at_once_leave_nothing_behind(stream):
    async with cluster(pairs_of(2, 3, ranks=2, work_s=0.002, token_s=0.001)) as it:
        ask = it.stream if stream else it.complete
        answers = await asyncio.gather(*(ask(max_tokens=4) for _ in range(64)))
        assert {status for status, _ in answers} == {200}
        await it.settle()
        assert it.service.transfers.finished == 64
        assert it.service.transfers.released == 0


async def test_with_several_choices_the_prefill_leg_lives_until_the_last_has_its_state():
    async with cluster(pairs_of(1, 1, token_s=0.05)) as it:
        prefill = it.prefills[0]
        prefill.answer_delay_s = 0.2
        asking = asyncio.create_task(it.stream(n=2, max_tokens=8))
        await it.until(lambda: it.service.proofs.last > 0)
        assert it.service.transfers.finished == 0
        assert (await asking)[0] == 200
        assert prefill.cancelled == 0
        assert it.service.transfers.finished == 1
        await it.settle()


async def test_a_client_that_leaves_a_stream_of_several_choices_releases_them_all():
    async with cluster(pairs_of(1, 1, token_s=0.05)) as it:
        asking = asyncio.create_task(it.stream(n=2, max_tokens=100))
        await it.until(lambda: it.service.proofs.last > 0)
        asking.cancel()
        await it.until(lambda: len(it.prefills[0].released) == 2)
        await it.settle()
