"""Steps that are only more text take a short way to the client: nothing is lost, reordered or uncounted on it."""

import asyncio
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, web

from api.backend import TokenQueue
from api.generation import Generation
from api.plain_text import PlainText
from api.pump import KEEP_ALIVE, Pulse, Pump, chunk_of
from api.reader import Reader
from api.resume import ASK_HEADER
from runtime.histogram import Histogram
from runtime.requests import Tokens
from tests.api.http.conftest import samples

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
WORDS = [b"a", b"b", b"", b"d"]


def step(*token_ids: int, finish: str | None = None) -> Tokens:
    return Tokens("r", token_ids, finish_reason=finish)


def open_text(words: Sequence[bytes] | None = WORDS) -> PlainText:
    plain = PlainText(Histogram((1.0,)))
    plain.frame = (b"<", b"|", b">")
    plain.open(words, 10.0)
    return plain


def test_plain_steps_are_framed_counted_and_timed() -> None:
    gaps = Histogram((1.0,))
    plain = PlainText(gaps)
    plain.frame = (b"<", b"|", b">")
    plain.open(WORDS, 10.0)
    assert plain.take(step(0), 10.5) == b"<a|a>"
    assert plain.take(step(1, 0), 12.5) == b"<ba|ba>"
    assert (plain.num_tokens, plain.last) == (3, 12.5)
    assert gaps.counts().counts == (1, 1)
    assert gaps.counts().total == 2.5


@pytest.mark.parametrize(
    "tokens",
    [step(2), step(0, 2), step(2, 0), step(4), step(0, 9), step(), step(0, finish="length"),
     Tokens("r", (0,), prompt_tokens=3)],
)  # fmt: skip
def test_what_may_be_more_than_text_is_left_as_it_was(tokens: Tokens) -> None:
    plain = open_text()
    assert plain.take(tokens, 11.0) == b""
    assert (plain.num_tokens, plain.last) == (0, 10.0)


def test_closed_it_takes_nothing() -> None:
    assert open_text(None).take(step(0), 11.0) == b""
    assert PlainText(Histogram((1.0,))).take(step(0), 11.0) == b""


class Writer:
    """Says what it was fed; its one choice may be plain."""

    def __init__(self) -> None:
        self.plain = (open_text(),)

    def start(self) -> bytes:
        return b""

    def feed(self, arrived: Sequence[tuple[int, Tokens]]) -> bytes:
        return b"".join(b"(%d)" % token_id for _, tokens in arrived for token_id in tokens.token_ids)

    def end(self) -> bytes:
        return b""

    def error(self, problem: Any) -> bytes:
        return b""


class Socket:
    """A transport, its protocol's flow control, and what was written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.num_unsent = 0
        self.writing_paused = False
        self.drained = asyncio.Event()
        self.write = self.written.append

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self.num_unsent

    async def drain(self) -> None:
        await self.drained.wait()


class Stream:
    """A pump at work."""

    def __init__(self, version: HttpVersion = HttpVersion11, *, is_noted: bool = False) -> None:
        self.queue = TokenQueue("r", lambda _: None)
        self.socket = Socket()
        request = SimpleNamespace(transport=self.socket, protocol=self.socket, version=version)
        generation = Generation([self.queue])
        self.pulse = Pulse(generation, 1000.0)
        self.pump = Pump(cast(web.Request, request), generation, Writer(), self.pulse, is_noted=is_noted)
        self.running = asyncio.create_task(self.pump.run(self.socket.drain))

    def silent(self, seconds: float) -> None:
        """As if nothing had been sent for so long."""
        assert self.pulse.plain is not None
        self.pulse.plain.written -= seconds
        self.pulse.last -= seconds

    async def push(self, *steps: Tokens) -> list[bytes]:
        """What was written of these steps."""
        await turns()
        before = len(self.socket.written)
        for tokens in steps:
            self.queue.push(tokens)
        await turns()
        return self.socket.written[before:]

    async def end(self) -> bytes:
        """The frames that are left for the coroutine."""
        self.queue.push(step(3, finish="length"))
        data, _ = await asyncio.wait_for(self.running, 5)
        self.pulse.stop()
        return data


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_plain_steps_and_others_leave_in_their_order() -> None:
    stream = Stream()
    assert await stream.push(step(0)) == [b"5\r\n<a|a>\r\n"]
    assert await stream.push(step(1), step(2), step(0)) == [b"5\r\n<b|b>\r\n", b"6\r\n(2)(0)\r\n"]
    assert await stream.push(step(0)) == [b"5\r\n<a|a>\r\n"]
    assert await stream.end() == b"(3)"


async def test_plain_steps_carry_notes_where_they_are_asked_for() -> None:
    stream = Stream(is_noted=True)
    assert await stream.push(step(0, 1)) == [b"7;t=0.1\r\n<ab|ab>\r\n"]
    assert await stream.end() == b"(3)"


async def test_without_chunks_the_events_follow_each_other() -> None:
    stream = Stream(HttpVersion10)
    assert await stream.push(step(0), step(1)) == [b"<a|a>", b"<b|b>"]
    assert await stream.end() == b"(3)"


async def test_a_plain_step_is_a_sign_of_life() -> None:
    stream = Stream()
    await turns()
    stream.silent(2000.0)
    assert stream.pulse.is_due()
    await stream.push(step(0))
    assert not stream.pulse.is_due()
    stream.silent(2000.0)
    stream.pulse._fire()
    await turns()
    assert stream.socket.written[-1] == b"%x\r\n%b\r\n" % (len(KEEP_ALIVE), KEEP_ALIVE)
    await stream.end()


async def test_a_step_that_says_nothing_yet_is_no_sign_of_life() -> None:
    stream = Stream()
    await stream.push(step(0))
    stream.silent(2000.0)
    plain = stream.pulse.plain
    assert plain is not None
    plain.open(WORDS, asyncio.get_running_loop().time())
    assert stream.pulse.is_due(), "it was read, but its text is held back"
    await stream.end()


async def test_after_the_end_nothing_is_written() -> None:
    stream = Stream()
    await stream.push(step(0))
    plain = stream.pulse.plain
    assert plain is not None
    await stream.end()
    assert not plain.write(step(0))
    await turns()
    assert stream.socket.written == [b"5\r\n<a|a>\r\n"]


@pytest.mark.parametrize("size", [1, 9, 10, 255, 256, 1023, 1024, 70_000])
def test_a_chunk_says_how_long_it_is(size: int) -> None:
    length, _, rest = chunk_of(b"x" * size, ()).partition(b"\r\n")
    assert int(length, 16) == size
    assert rest == b"x" * size + b"\r\n"


async def test_a_client_that_does_not_read_gets_nothing_new_until_it_has() -> None:
    stream = Stream()
    await turns()
    stream.socket.num_unsent = 10
    assert await stream.push(step(0)) == [b"3\r\n(0)\r\n"], "with bytes unsent it is asked whether there are too many"
    stream.socket.writing_paused = True
    assert await stream.push(step(0), step(1)) == []
    stream.socket.num_unsent = 0
    assert await stream.push(step(2)) == [], "the first to come are the first to leave"
    stream.socket.writing_paused = False
    stream.socket.drained.set()
    await turns()
    assert stream.socket.written[-1] == b"9\r\n(0)(1)(2)\r\n"
    assert await stream.push(step(0)) == [b"5\r\n<a|a>\r\n"]
    assert await stream.end() == b"(3)"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
async def test_of_an_ordinary_stream_only_the_ends_are_read(serve: Any, path: str, monkeypatch: Any) -> None:
    server = await serve(step_s=0.002)
    read: list[int] = []
    whole_read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, arrived: read.append(len(arrived)) or whole_read(self, arrived))
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt": [5], "max_tokens": 30, "stream": True}
    response = await server.post(path, body)
    assert len(re.findall(rb'"(?:reasoning|text|thinking)":"."', await response.read())) == 30
    assert sum(read) <= 3


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_every_token_is_counted_and_every_gap_timed(serve: Any, path: str, stream: bool) -> None:
    server = await serve(step_s=0.002)
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt": [5], "max_tokens": 20, "stream": stream}
    await server.post(path, body)
    values = {name: value for (name, _), value in (await samples(server)).items()}
    assert values["vllm:request_generation_tokens_sum"] == 20
    assert values["vllm:time_to_first_token_seconds_count"] == 1
    assert values["vllm:inter_token_latency_seconds_count"] == 19
    decoding_s = values["vllm:request_decode_time_seconds_sum"]
    assert values["vllm:inter_token_latency_seconds_sum"] == pytest.approx(decoding_s)
    assert values["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(decoding_s / 19)


async def test_the_tokens_of_a_client_that_leaves_are_counted(serve: Any) -> None:
    server = await serve(step_s=0.002)
    async with server.session.post(
        server.base_url + COMPLETIONS, json={"prompt": [5], "max_tokens": 1000, "stream": True}
    ) as response:
        for _ in range(10):
            await response.content.readuntil(b"\n\n")
    while server.engine.num_running:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    await turns()
    values = {name: value for (name, _), value in (await samples(server)).items()}
    assert values["vllm:request_success_totalabort"] == 1
    assert values["vllm:request_generation_tokens_sum"] >= 10


@pytest.mark.parametrize("counts_prompts", [True, False])
async def test_a_resumed_streams_own_tokens_are_timed_from_the_first_on(serve: Any, counts_prompts: bool) -> None:
    server = await serve(step_s=0.002)
    server.engine.counts_prompts = counts_prompts
    body = {"prompt": [4], "max_tokens": 10, "stream": True, "kv_transfer_params": {"resume": {"token_ids": [5, 6, 7]}}}
    await server.post(COMPLETIONS, body, headers={ASK_HEADER: "1"})
    values = {name: value for (name, _), value in (await samples(server)).items()}
    assert values["vllm:request_generation_tokens_sum"] == 7
    assert values["vllm:time_to_first_token_seconds_count"] == 1
    assert values["vllm:inter_token_latency_seconds_count"] == 6
