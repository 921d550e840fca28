"""A rank with dummy pools in a process of its own: reads one JSON command a line on stdin, answers one on stdout.

`python peer_process.py '{"config": {...}, "page_bytes": ..., "num_pages": ..., ...}'`
"""

import json
import logging
import sys
import time
from collections import deque

import msgspec
import numpy as np
import xxhash

from kv_transfer.agent import TransferAgent
from kv_transfer.agent_events import AgentEvent
from kv_transfer.config import TransferConfig
from kv_transfer.format import StateFormat
from kv_transfer.regions import MemoryRegion


class Rank:
    def __init__(self, setup: dict) -> None:
        page_bytes, slot_bytes = setup["page_bytes"], setup["slot_bytes"]
        # Poison: what nobody wrote is 0xA5.
        self.pages = np.full((setup["num_pages"], page_bytes), 0xA5, dtype=np.uint8)
        self.slots = np.full((setup["num_slots"], slot_bytes), 0xA5, dtype=np.uint8)
        self.format = StateFormat(
            model_fingerprint=setup["fingerprint"],
            layout={"regions": []},
            page_bytes=page_bytes,
            slot_bytes=slot_bytes,
            page_tokens=256,
        )
        self.agent = TransferAgent(
            msgspec.convert(setup["config"], TransferConfig),
            self.format,
            pages=MemoryRegion(self.pages.ctypes.data, page_bytes, setup["num_pages"]),
            slots=MemoryRegion(self.slots.ctypes.data, slot_bytes, setup["num_slots"]),
            rank=0,
        )
        self.backlog: deque[AgentEvent] = deque()
        self.seen_bytes = 0
        self.agent.start(20.0)

    def hello(self) -> dict:
        return {"address": self.agent.address, "epoch": self.agent.epoch, "digest": self.format.digest}

    def fill(self, pages: list[int], slot: int | None, seed: int) -> None:
        """Content that names its record: no two records of one seed are equal."""
        for index in pages:
            self.pages[index] = np.random.default_rng((seed, index)).integers(0, 256, self.pages.shape[1], np.uint8)
        if slot is not None:
            self.slots[slot] = np.random.default_rng((seed, 1 << 20, slot)).integers(
                0, 256, self.slots.shape[1], np.uint8
            )

    def poison(self, pages: list[int], slot: int) -> None:
        self.pages[pages] = 0x5A
        self.slots[slot] = 0x5A

    def is_poisoned(self, pages: list[int], slot: int) -> bool:
        return bool((self.pages[pages] == 0x5A).all() and (self.slots[slot] == 0x5A).all())

    def digest(self, pages: list[int], slot: int) -> list[str]:
        """128-bit hashes of the records' bytes, pages in the given order, then the slot."""
        records = [*(self.pages[index] for index in pages), self.slots[slot]]
        return [xxhash.xxh3_128_hexdigest(record) for record in records]

    def call(self, method: str, *args: object) -> None:
        getattr(self.agent, method)(*[a.encode() if i in BYTES.get(method, ()) else a for i, a in enumerate(args)])

    def events(self, count: int, timeout_s: float) -> list[dict]:
        """The next `count` events, fewer when the time is over."""
        until = time.monotonic() + timeout_s
        while len(self.backlog) < count and time.monotonic() < until:
            self.backlog.extend(self.agent.poll())
            time.sleep(0.001)
        found = [self.backlog.popleft() for _ in range(min(count, len(self.backlog)))]
        return [as_json(event) for event in found]

    def mark(self) -> None:
        """`wait_for_bytes` counts from here."""
        self.seen_bytes = self.agent.stats().bytes_received

    def settle(self) -> None:
        """End what a test left open and forget its events."""
        for transfer_id in [*self.agent._sends, *self.agent._receives]:
            self.agent.release(transfer_id)
        until = time.monotonic() + 10.0
        while (self.agent._sends or self.agent._receives) and time.monotonic() < until:
            self.agent.poll()
            time.sleep(0.001)
        self.backlog.clear()

    def wait_for_bytes(self, num_bytes: int, timeout_s: float) -> bool:
        """Until that many more bytes have arrived since the mark or the last such wait."""
        num_bytes += self.seen_bytes
        until = time.monotonic() + timeout_s
        while self.agent.stats().bytes_received < num_bytes:
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
        self.seen_bytes = num_bytes
        return True

    def stats(self) -> dict:
        return msgspec.structs.asdict(self.agent.stats())

    def audit(self) -> None:
        self.agent.check_integrity()


BYTES = {"open_send": (2,), "publish_ready": (3,), "open_receive": (4,)}
"""Positions of arguments that are bytes; JSON has text there."""


def as_json(event: AgentEvent) -> dict:
    fields = msgspec.structs.asdict(event)
    if "payload" in fields:
        fields["payload"] = fields["payload"].decode()
    return {"kind": type(event).__name__, **fields}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    rank = Rank(json.loads(sys.argv[1]))
    print(json.dumps({"result": rank.hello()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"result": getattr(rank, command["do"])(*command["args"])}
        except Exception as error:  # told to the test, which decides whether it was expected
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    rank.agent.stop(5.0)


if __name__ == "__main__":
    main()
