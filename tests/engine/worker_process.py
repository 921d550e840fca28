"""A child process that serves the stand-in model, as an engine process would; and a parent that leaves it alone."""

import asyncio
import multiprocessing
import os
import sys
import tempfile

from engine.worker import run_worker
from runtime.channel import ChannelAddress, EngineChannel, NodeChannel
from runtime.errors import ProcessDied, TandemError
from runtime.process import ignore_terminal_signals
from runtime.requests import EngineReady
from tests.engine.harness import Harness

ORPHANED = 3


def serve(address: ChannelAddress, failures: int = 0, pid_file: str = "") -> None:
    """Exit codes: 0 asked to stop, 1 the engine gave up, `ORPHANED` the parent is gone (also written to a file)."""
    ignore_terminal_signals()
    harness = Harness(stats_interval_s=0.05)
    harness.model.fail_next = failures
    channel = EngineChannel(address)
    ready = EngineReady(
        rank=0, epoch="", handoff_address="", format_digest="", format_summary="", max_model_len=256, num_pages=64,
        num_slots=12,
    )  # fmt: skip
    try:
        run_worker(harness.engine, channel, ready)
    except ProcessDied:
        if pid_file:
            with open(pid_file, "w") as file:
                file.write(str(os.getpid()))
        raise SystemExit(ORPHANED) from None
    except TandemError:
        raise SystemExit(1) from None


async def _start_and_vanish(pid_file: str) -> None:
    directory = tempfile.mkdtemp()
    address = ChannelAddress(directory, 0)
    ready = asyncio.Event()
    NodeChannel(address, lambda _: ready.set())
    child = multiprocessing.get_context("spawn").Process(target=serve, args=(address, 0, pid_file))
    child.start()
    await asyncio.wait_for(ready.wait(), 30)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_start_and_vanish(sys.argv[1]))
