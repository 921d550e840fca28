"""Real ranks in real processes, driven over pipes."""

import json
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("peer_process.py")


class Peer:
    """The test's end of one `peer_process.py`."""

    def __init__(self, **setup: Any) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MC_", "TANDEM_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        hello = self._answer(30.0)
        self.address: str = hello["address"]
        self.epoch: str = hello["epoch"]
        self.format_digest: str = hello["digest"]

    def do(self, command: str, *args: Any, timeout_s: float = 30.0) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": command, "args": args}) + "\n")
        self.process.stdin.flush()
        return self._answer(timeout_s)

    def _answer(self, timeout_s: float) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        assert ready, f"no answer within {timeout_s} s"
        line = self.process.stdout.readline()
        assert line, f"the process ended with {self.process.wait(5)}"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def call(self, method: str, *args: Any) -> None:
        self.do("call", method, *args)

    def events(self, *kinds: str, timeout_s: float = 20.0) -> list[dict[str, Any]]:
        """The next events, which must be of these kinds in this order."""
        found = self.do("events", len(kinds), timeout_s, timeout_s=timeout_s + 10)
        assert [event["kind"] for event in found] == list(kinds), found
        return found

    def no_event(self, during_s: float) -> None:
        assert self.do("events", 1, during_s) == []

    def send(self, transfer_id: str, num_tokens: int, pages: list[int], slot: int, *, seed: int = 1) -> None:
        """A whole prefill at once."""
        self.do("fill", pages, slot, seed)
        self.call("open_send", transfer_id, num_tokens, "hash")
        self.call("publish_ready", transfer_id, pages, slot, "first token")

    def receive(self, transfer_id: str, source: "Peer", num_tokens: int, pages: list[int], slot: int) -> None:
        self.call("open_receive", transfer_id, source.address, source.epoch, num_tokens, "hash", pages, slot)

    def audit(self) -> None:
        self.do("audit")

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """Ends the rank the orderly way; its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(15)


def _spawning() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def spawn(
        *,
        num_pages: int = 64,
        num_slots: int = 4,
        page_bytes: int = 1 << 16,
        slot_bytes: int = 1 << 18,
        fingerprint: str = "dummy",
        **config: Any,
    ) -> Peer:
        peer = Peer(
            config=config,
            num_pages=num_pages,
            num_slots=num_slots,
            page_bytes=page_bytes,
            slot_bytes=slot_bytes,
            fingerprint=fingerprint,
        )
        peers.append(peer)
        return peer

    yield spawn
    for peer in peers:
        if peer.process.poll() is None:
            peer.signal(signal.SIGCONT)
            peer.kill()
        for pipe in (peer.process.stdin, peer.process.stdout):
            if pipe is not None:
                pipe.close()


spawn_peer = pytest.fixture(_spawning, name="spawn_peer")
"""Starts ranks: 64 KiB pages and 256 KiB slots unless told otherwise; keywords beyond sizes go to the config."""

spawn_shared_peer = pytest.fixture(_spawning, name="spawn_shared_peer", scope="module")
"""The same for ranks that serve all tests of a module."""


@pytest.fixture
def transfer_id() -> str:
    return uuid.uuid4().hex
