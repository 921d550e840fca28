"""An engine process from the outside: messages in, messages out, and how it ends."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.channel import ChannelAddress, NodeChannel
from runtime.process import ChildProcess
from runtime.requests import Abort, Drain, Drained, EngineReady, EngineStats, RequestFailed, Shutdown, StepOutput
from tests.engine.harness import submit
from tests.engine.hash_lm import greedy
from tests.engine.worker_process import serve

PROMPT = [5, 6, 7, 8]


class Worker:
    """The parent's end."""

    def __init__(self, channel: NodeChannel, process: ChildProcess, messages: "asyncio.Queue[Any]") -> None:
        self.channel, self.process, self.messages = channel, process, messages

    async def until(self, wanted: Callable[[Any], bool]) -> list[Any]:
        """Everything up to the first message that is wanted."""
        seen: list[Any] = []
        while not seen or not wanted(seen[-1]):
            seen.append(await asyncio.wait_for(self.messages.get(), 20))
        return seen


@contextlib.asynccontextmanager
async def worker(directory: Path, failures: int = 0) -> AsyncIterator[Worker]:
    address = ChannelAddress(str(directory), 0)
    messages: asyncio.Queue[Any] = asyncio.Queue()
    channel = NodeChannel(address, messages.put_nowait)
    process = ChildProcess("engine", serve, address, failures)
    process.start()
    try:
        first = await process.until(asyncio.ensure_future(messages.get()), 30)
        assert isinstance(first, EngineReady)
        yield Worker(channel, process, messages)
    finally:
        channel.send(Shutdown())
        await process.stop(grace_s=10)
        channel.close()


def tokens_of(messages: list[Any], request_id: str) -> list[int]:
    outputs = [output for m in messages if isinstance(m, StepOutput) for output in m.outputs]
    return [token_id for output in outputs if output.request_id == request_id for token_id in output.token_ids]


def ends(request_id: str) -> Callable[[Any], bool]:
    def is_end(message: Any) -> bool:
        outputs = message.outputs if isinstance(message, StepOutput) else ()
        return any(output.request_id == request_id and output.finish_reason for output in outputs)

    return is_end


async def test_requests_are_served_counted_and_drained(tmp_path: Path) -> None:
    async with worker(tmp_path) as engine:
        engine.channel.send(submit("a", PROMPT, max_tokens=20))
        engine.channel.send(submit("gone", PROMPT, max_tokens=200))
        engine.channel.send(Abort("gone"))
        assert tokens_of(await engine.until(ends("a")), "a") == greedy(PROMPT, 20)
        stats = (await engine.until(lambda m: isinstance(m, EngineStats) and m.generated_tokens >= 20))[-1]
        assert (stats.running, stats.pages_free) == (0, stats.pages_total)
        engine.channel.send(Drain())
        assert (await engine.until(lambda m: isinstance(m, Drained)))[-1] == Drained(0)
        engine.channel.send(Shutdown())
        assert await asyncio.wait_for(engine.process.died(), 10) == 0


async def test_an_idle_engine_sleeps_and_wakes_at_once(tmp_path: Path) -> None:
    async with worker(tmp_path) as engine:
        await asyncio.sleep(0.3)
        process = psutil.Process(engine.process.pid)
        before = process.cpu_times()
        await asyncio.sleep(1.0)
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.2
        engine.channel.send(submit("a", PROMPT, max_tokens=1))
        await engine.until(ends("a"))


async def test_an_engine_that_gives_up_tells_every_request_and_exits_with_an_error(tmp_path: Path) -> None:
    async with worker(tmp_path, failures=10) as engine:
        for number in range(3):
            engine.channel.send(submit(f"r{number}", PROMPT))
            message = (await engine.until(lambda m: isinstance(m, RequestFailed)))[-1]
            assert (message.request_id, message.kind) == (f"r{number}", "internal")
            assert "the device is on fire" in message.message
        assert await asyncio.wait_for(engine.process.died(), 10) == 1


@pytest.mark.timeout(60)
async def test_an_engine_whose_parent_vanished_ends(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-m", "tests.engine.worker_process", str(pid_file)]
    await asyncio.to_thread(subprocess.run, command, check=True, timeout=40, cwd=Path(__file__).parents[2])
    assert await asyncio.to_thread(_ended, pid_file)


def _ended(pid_file: Path) -> bool:
    """Wait up to 10 s for a process that names itself when it ends."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if pid_file.exists() and pid_file.read_text():
            _, alive = psutil.wait_procs(_process(int(pid_file.read_text())), timeout=10)
            return not alive
        time.sleep(0.05)
    return False


def _process(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return []
