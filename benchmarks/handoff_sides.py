"""The sides of a measured hand-off: pools of Flash's sizes and an agent over them, here or in a process of its own."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from engine.pool_bytes import PoolBytes
from kv_transfer.agent import TransferAgent
from kv_transfer.agent_events import AgentEvent, SendEnded
from kv_transfer.config import TransferConfig
from kv_transfer.format import StateFormat
from kv_transfer.mooncake import MooncakeEngine
from kv_transfer.regions import MemoryRegion
from model.presets import PRESETS
from model.state_layout import build_state_layout


class Rank:
    """One side: pools of Flash's sizes, an agent, and a bare engine over the same memory for the comparison."""

    def __init__(self, config: TransferConfig, num_pages: int, device: str) -> None:
        layout = build_state_layout(PRESETS["flash"](), row_format="fp8", index_format="mxfp4")
        self.format = StateFormat(
            model_fingerprint="flash",
            layout=msgspec.to_builtins(layout),
            page_bytes=layout.page_bytes,
            slot_bytes=layout.slot_bytes,
            page_tokens=layout.page_tokens,
        )
        # One slot's worth more than the pages, so that a whole state is also one contiguous buffer.
        num_bytes = num_pages * layout.page_bytes + 2 * layout.slot_bytes
        self._memory = torch.full((num_bytes,), 7, dtype=torch.uint8, device=device)
        if self._memory.is_cuda:
            torch.cuda.set_device(self._memory.device)
            torch.cuda.synchronize()
        self.device = self._memory.device
        base = self._memory.data_ptr()
        self.pages = MemoryRegion(base, layout.page_bytes, num_pages)
        self.slots = MemoryRegion(base + self.pages.num_bytes, layout.slot_bytes, 2)
        self._event = threading.Event()
        self.agent = TransferAgent(
            config, self.format, pages=self.pages, slots=self.slots, rank=0, wake=self._event.set,
            memory=PoolBytes(self._memory),
        )  # fmt: skip
        self.agent.start()
        self.bare = MooncakeEngine(config, (MemoryRegion(base, num_bytes, 1),))
        self.base_address = base

    def next_event(self, kind: type[AgentEvent]) -> AgentEvent:
        """Waits for the next event, which must be of this kind."""
        while not (events := self.agent.poll()):
            self._event.wait(10.0)
            self._event.clear()
        if not isinstance(events[0], kind) or len(events) > 1:
            raise SystemExit(f"unexpected: {events}")
        return events[0]


def serve(config: TransferConfig, num_pages: int, device: str) -> None:
    """The prefill side. Lines on stdin: [transfer id, number of tokens] admits a prompt, [transfer id, pages] finishes
    it; the answer to the latter, after the state was fetched, is when it was finished, seconds of the common clock.
    """
    rank = Rank(config, num_pages, device)
    facts = {
        "address": rank.agent.address,
        "epoch": rank.agent.epoch,
        "session_id": rank.bare.session_id,
        "base_address": rank.base_address,
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        transfer_id, what = json.loads(line)
        done_at = 0.0
        if isinstance(what, int):
            rank.agent.open_send(transfer_id, what, b"hash")
        else:
            done_at = time.monotonic()
            rank.agent.publish_ready(transfer_id, what, 0, b"token")
            rank.next_event(SendEnded)
        print(json.dumps(done_at), flush=True)
    rank.agent.stop()


class Source:
    """The parent's end of the process that serves states."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.handoff", "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self.line()

    def line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the serving process ended with {self._process.wait()}")
        return json.loads(line)

    def tell(self, transfer_id: str, what: int | Sequence[int]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([transfer_id, what]) + "\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)
