"""A decode process without an engine: fetches states through Mooncake into its own pools and continues them."""

import time
from multiprocessing.connection import Connection

import msgspec

from kv_transfer.agent import TransferAgent
from kv_transfer.agent_events import AgentEvent
from kv_transfer.config import TransferConfig
from kv_transfer.format import StateFormat
from kv_transfer.regions import MemoryRegion
from tests.handoff.state_process import decode, model_and_pools
from tests.model.helpers import Pools, Request


class Fetch(msgspec.Struct, array_like=True):
    """One request to continue, and where its state is."""

    transfer_id: str
    address: str
    epoch: str
    length: int
    prompt_hash: bytes
    first_token: int


def agent_for(pools: Pools, num_pages: int, num_slots: int) -> TransferAgent:
    layout = pools.layout
    form = StateFormat(
        model_fingerprint="test",
        layout=msgspec.to_builtins(layout),
        page_bytes=layout.page_bytes,
        slot_bytes=layout.slot_bytes,
        page_tokens=layout.page_tokens,
    )
    agent = TransferAgent(
        TransferConfig(),
        form,
        pages=MemoryRegion(pools.pages.data_ptr(), layout.page_bytes, num_pages),
        slots=MemoryRegion(pools.slots.data_ptr(), layout.slot_bytes, num_slots),
        rank=0,
    )
    agent.start()
    return agent


def next_event(agent: TransferAgent, deadline_s: float = 30.0) -> AgentEvent:
    deadline = time.monotonic() + deadline_s
    while not (events := agent.poll()):
        assert time.monotonic() < deadline, "no event from the transfer"
        time.sleep(0.001)
    (event,) = events
    return event


def main(connection: Connection, how: tuple[str, str, str, str], num_pages: int, num_slots: int) -> None:
    """Answers each `Fetch` with the logits of decoding it, until the connection closes."""
    model, state = model_and_pools(*how, num_pages, num_slots, 0x7F)
    agent = agent_for(state, num_pages, num_slots)
    try:
        while True:
            try:
                fetch = msgspec.msgpack.decode(connection.recv_bytes(), type=Fetch)
            except EOFError:
                return
            count = state.layout.pages_for(fetch.length)
            pages = list(range(num_pages - 1, num_pages - 2 - count, -1))
            request = Request(num_slots - 1, pages, fetch.length)
            agent.open_receive(
                fetch.transfer_id,
                fetch.address,
                fetch.epoch,
                fetch.length,
                fetch.prompt_hash,
                pages[:count],
                request.slot,
            )
            event = next_event(agent)
            assert type(event).__name__ == "Received", event
            connection.send_bytes(decode(model, state, [request], [fetch.first_token]))
    finally:
        agent.stop()
