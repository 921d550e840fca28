"""For every prompt length: prefill here, the state as bytes to another process, decode there equals decode here."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import msgspec
import pytest
import torch

from model.transformer import Transformer
from tests.handoff.state_process import State, decode, main, model_and_pools
from tests.model.helpers import Pools, Request, step

FORMATS = {
    "float32, released numerics, packed rows": ("released", "float32", "fp8", "mxfp4"),
    "bfloat16, released numerics, packed rows": ("released", "bfloat16", "fp8", "mxfp4"),
    "float32, plain numerics, float32 rows": ("plain", "float32", "f32", "f32"),
}
GROUP = 25
BLOCK = 16
"""Of the coarsest compressor of the model in `state_process`."""
NUM_PAGES = GROUP * 5
EVERY = list(range(1, 601))
AROUND = [767, 768, 769, 1023, 1024, 1025]
LONG = [2047, 2048, 2049, 2051, 2052]
CASES = {
    "float32, released numerics, packed rows": [*EVERY, *AROUND],
    "bfloat16, released numerics, packed rows": [*range(1, 24), *range(250, 262), 511, 512, 513],
    "float32, plain numerics, float32 rows": [*range(1, 24), *range(250, 262), 511, 512, 513],
}


@pytest.fixture(params=FORMATS)
def other_process(request: pytest.FixtureRequest) -> Iterator[tuple[str, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, FORMATS[request.param], NUM_PAGES, GROUP))
    process.start()
    theirs.close()
    yield request.param, ours
    ours.close()
    process.join(20)
    assert process.exitcode == 0


def prompt(length: int) -> list[int]:
    return torch.randint(160, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def prefill(model: Transformer, state: Pools, requests: list[Request], lengths: list[int]) -> list[int]:
    """All prompts in one pass -> their first tokens. Neighbouring lengths are prefixes of one prompt, and what lies
    before the last block boundary that all of them have passed is computed once, as a chunk, and copied."""
    prompts = [prompt(length) for length in lengths]
    if lengths == list(range(lengths[0], lengths[0] + len(lengths))):
        prompts = [prompts[-1][:length] for length in lengths]
        begun = (lengths[0] - 1) // BLOCK * BLOCK
        first = requests[0]
        if begun:
            step(model, state.views, [(first, prompts[0][:begun])], all_logits=False)
        for other in requests[1:]:
            other.length = begun
            state.slots[other.slot] = state.slots[first.slot]
            for page, copied in zip(first.pages[: state.layout.pages_for(begun)], other.pages, strict=False):
                state.pages[copied] = state.pages[page]
    parts = [(request, tokens[request.length :]) for request, tokens in zip(requests, prompts, strict=True)]
    return step(model, state.views, parts, all_logits=False).argmax(dim=-1).tolist()


def groups(lengths: list[int]) -> list[list[int]]:
    return [lengths[start : start + GROUP] for start in range(0, len(lengths), GROUP)]


@pytest.mark.timeout(600)
def test_decode_in_another_process_equals_decode_here_bit_for_bit(other_process: tuple[str, Connection]) -> None:
    name, connection = other_process
    model, state = model_and_pools(*FORMATS[name], NUM_PAGES, GROUP, 0xFF)
    batches = groups(CASES[name])
    if name.startswith("float32, released"):
        batches += [[length] for length in LONG]
    for lengths in batches:
        free = iter(range(NUM_PAGES))
        # One page more than the prompt needs: decoding may cross into it.
        requests = [
            Request(slot, [next(free) for _ in range(state.layout.pages_for(length) + 1)])
            for slot, length in enumerate(lengths)
        ]
        first_tokens = prefill(model, state, requests, lengths)
        states = [
            State(
                request.length,
                token,
                state.pages[request.pages[: state.layout.pages_for(request.length)]].numpy().tobytes(),
                state.slots[request.slot].numpy().tobytes(),
            )
            for request, token in zip(requests, first_tokens, strict=True)
        ]
        connection.send_bytes(msgspec.msgpack.encode(states))
        here = decode(model, state, requests, [item.first_token for item in states])
        assert connection.poll(60), "the other process does not answer"
        assert connection.recv_bytes() == here, f"lengths {lengths[0]}..{lengths[-1]}"
        assert torch.frombuffer(bytearray(here), dtype=torch.float32).isfinite().all()
