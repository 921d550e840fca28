"""A sample of prompt lengths through real Mooncake to another process: decode there equals decode here, bit for bit."""

import multiprocessing

import msgspec
import pytest
import torch

from tests.handoff.mooncake_process import Fetch, agent_for, main, next_event
from tests.handoff.state_process import decode, model_and_pools
from tests.handoff.test_every_length import FORMATS, prompt
from tests.model.helpers import Request, step

LENGTHS = [1, 3, 4, 5, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513, 600, 2047, 2048, 2051, 2052]
NUM_PAGES, NUM_SLOTS = 24, 3


@pytest.mark.parametrize("name", FORMATS)
def test_a_state_that_crossed_through_mooncake_continues_bit_for_bit(name: str) -> None:
    model, state = model_and_pools(*FORMATS[name], NUM_PAGES, NUM_SLOTS, 0xFF)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, FORMATS[name], NUM_PAGES, NUM_SLOTS))
    process.start()
    theirs.close()
    agent = agent_for(state, NUM_PAGES, NUM_SLOTS)
    try:
        for number, length in enumerate(LENGTHS if name.startswith("float32, released") else LENGTHS[:14]):
            request = Request(0, list(range(state.layout.pages_for(length) + 1)))
            logits = step(model, state.views, [(request, prompt(length))], all_logits=False)
            token = int(logits[-1].argmax())
            transfer_id, prompt_hash = f"{number:032x}", bytes(16)
            agent.open_send(transfer_id, length, prompt_hash)
            agent.publish_ready(transfer_id, request.pages[: state.layout.pages_for(length)], request.slot, b"first")
            fetch = Fetch(transfer_id, agent.address, agent.epoch, length, prompt_hash, token)
            ours.send_bytes(msgspec.msgpack.encode(fetch))
            ended = next_event(agent)
            assert (ended.transfer_id, ended.outcome) == (transfer_id, "fetched")
            assert ours.poll(60), f"no answer for a prompt of {length} tokens"
            there = ours.recv_bytes()
            assert there == decode(model, state, [request], [token]), f"prompt of {length} tokens"
            assert torch.frombuffer(bytearray(there), dtype=torch.float32).isfinite().all()
        agent.check_integrity()
    finally:
        ours.close()
        process.join(20)
        agent.stop()
    assert process.exitcode == 0
