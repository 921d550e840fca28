import asyncio
import threading
import time
from pathlib import Path

import msgspec
import pytest

from runtime.channel import ChannelAddress, EngineChannel, NodeChannel, announce
from runtime.errors import ProcessDied
from runtime.process import ChildProcess
from runtime.requests import (
    Drain,
    Drained,
    EngineStats,
    FromEngine,
    RankLost,
    SamplingParams,
    Shutdown,
    StepOutput,
    Submit,
    Tokens,
)
from tests.runtime.channel_echo import main, never_ready


def submit(number: int) -> Submit:
    return Submit(request_id=str(number), prompt_ids=tuple(range(number)), sampling=SamplingParams(max_tokens=1))


async def started(tmp_path: Path) -> tuple[ChildProcess, NodeChannel, asyncio.Queue[FromEngine]]:
    address = ChannelAddress(str(tmp_path), 0)
    messages: asyncio.Queue[FromEngine] = asyncio.Queue()
    channel = NodeChannel(address, messages.put_nowait)
    child = ChildProcess("echo", main, address)
    child.start()
    assert await child.until(asyncio.ensure_future(messages.get()), 20) == Drained(0)
    return child, channel, messages


async def test_messages_cross_in_order_and_the_child_ends_when_asked(tmp_path: Path) -> None:
    child, channel, messages = await started(tmp_path)
    for number in range(1000):
        channel.send(submit(number))
    answers: list[Tokens] = []
    while len(answers) < 1000:
        answer = await asyncio.wait_for(messages.get(), 10)
        assert isinstance(answer, StepOutput)
        answers += answer.outputs
    assert [(tokens.request_id, len(tokens.token_ids)) for tokens in answers] == [
        (str(number), number) for number in range(1000)
    ]
    channel.send(Shutdown())
    assert await asyncio.wait_for(child.died(), 10) == 0
    channel.close()


async def test_steps_that_waited_for_their_reader_arrive_as_one(tmp_path: Path) -> None:
    address = ChannelAddress(str(tmp_path), 0)
    messages: asyncio.Queue[FromEngine] = asyncio.Queue()
    channel = NodeChannel(address, messages.put_nowait)
    engine = EngineChannel(address)
    for number in range(3):
        engine.send(StepOutput((Tokens("a", (number,)), Tokens("b", (10 + number,)))))
    engine.send(Drained(0))
    engine.close()
    time.sleep(0.2)  # noqa: ASYNC251 (the reader is busy)
    got: list[FromEngine] = []
    async with asyncio.timeout(10):
        while Drained(0) not in got:
            got.append(await messages.get())
    steps = [message for message in got if isinstance(message, StepOutput)]
    by_request = {name: [t.token_ids for s in steps for t in s.outputs if t.request_id == name] for name in "ab"}
    assert {name: sum(ids, ()) for name, ids in by_request.items()} == {"a": (0, 1, 2), "b": (10, 11, 12)}
    assert len(steps) < 3
    channel.close()


async def test_the_parent_learns_the_exit_code_of_a_child_that_dies(tmp_path: Path) -> None:
    child, channel, messages = await started(tmp_path)
    channel.send(Drain())
    with pytest.raises(ProcessDied, match="exit code 7"):
        await child.until(asyncio.ensure_future(messages.get()), 10)
    channel.close()


async def test_a_child_that_is_never_ready_is_given_up_and_killed(tmp_path: Path) -> None:
    channel = NodeChannel(ChannelAddress(str(tmp_path), 0), lambda _: None)
    child = ChildProcess("sleeper", never_ready, ChannelAddress(str(tmp_path), 0))
    child.start()
    with pytest.raises(ProcessDied, match=r"not ready after 0\.5 s"):
        await child.until(asyncio.get_running_loop().create_future(), 0.5)
    await child.stop(grace_s=0.1)
    assert not child.alive
    channel.close()


def test_wake_ends_a_wait_from_another_thread(tmp_path: Path) -> None:
    channel = EngineChannel(ChannelAddress(str(tmp_path), 0))
    timer = threading.Timer(0.1, channel.wake)
    timer.start()
    began = time.monotonic()
    assert channel.receive(timeout_s=20) == []
    assert time.monotonic() - began < 10
    timer.join()
    channel.close(flush_s=0)


async def test_sending_to_a_child_that_has_died_does_not_block(tmp_path: Path) -> None:
    child, channel, _ = await started(tmp_path)
    channel.send(Drain())
    assert await asyncio.wait_for(child.died(), 10) == 7
    begun = time.monotonic()
    for number in range(100):
        channel.send(submit(number))
    assert time.monotonic() - begun < 5
    channel.close()


def test_waking_a_closed_channel_is_harmless(tmp_path: Path) -> None:
    channel = EngineChannel(ChannelAddress(str(tmp_path), 0))
    channel.close()
    channel.wake()


async def test_several_api_processes_each_hear_what_concerns_them(tmp_path: Path) -> None:
    address = ChannelAddress(str(tmp_path), 0, num_readers=3)
    engine = EngineChannel(address)
    # What is said before a process listens waits for it.
    engine.send(EngineStats(rank=0, running=1))
    heard: list[asyncio.Queue[FromEngine]] = [asyncio.Queue() for _ in range(3)]
    channels = [NodeChannel(address, queue.put_nowait, reader) for reader, queue in enumerate(heard)]

    async def next_of(reader: int) -> FromEngine:
        return await asyncio.wait_for(heard[reader].get(), 30)

    for reader, channel in enumerate(channels):
        channel.send(msgspec.structs.replace(submit(reader), reader=reader))
    asked: list[str] = []
    while len(asked) < 3:
        messages = await asyncio.to_thread(engine.receive, 10.0)
        asked += [message.request_id for message in messages if isinstance(message, Submit)]
    engine.send(StepOutput(tuple(Tokens(request_id, (7,), finish_reason="stop") for request_id in asked)))
    engine.send(Drained(0))
    for reader in range(3):
        assert await next_of(reader) == EngineStats(rank=0, running=1)
        assert await next_of(reader) == StepOutput((Tokens(str(reader), (7,), finish_reason="stop"),))
    assert await next_of(0) == Drained(0)
    await asyncio.to_thread(engine.close)
    await asyncio.to_thread(announce, address, RankLost(0, "exit code -9"))
    for reader in (1, 2):
        assert await next_of(reader) == RankLost(0, "exit code -9")
    assert all(queue.empty() for queue in heard)
    for channel in channels:
        channel.close()
