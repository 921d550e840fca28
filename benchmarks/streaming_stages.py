"""Where an API process spends its time on a streamed token, stage by stage.

    python -m benchmarks.streaming_stages [--streams 512] [--rounds 40]

Every stage runs on the same real objects for all streams in turn, as one message of the engine sets it off; the fastest
of several rounds counts, in microseconds of CPU per token. What is not here is the write itself, which is the "bare"
row of `benchmarks.streaming_api`.
"""

import argparse
import asyncio
import operator
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import uvloop
from aiohttp import HttpVersion11, web
from prometheus_client import CollectorRegistry

from api.backend import EngineInfo
from api.chat_format import ChatResponse, ChatShape
from api.chat_output import ChatOutput
from api.context import Context
from api.generation import Generation
from api.logprobs import TokenNames
from api.metrics import ApiMetrics
from api.parse_events import ParserStart, StartState
from api.pump import Pulse, Pump
from api.reader import Reader
from api.settings import ApiSettings
from api.submission import Submission
from api.text_output import TextRules
from api.tokenizer import Tokenizer
from benchmarks.paced_engine import timing_spec
from node.engine_client import NodeEngineClient
from node.engine_link import EngineLink
from runtime.channel import ChannelAddress
from runtime.requests import FromEngine, SamplingParams, StepOutput, Submit, Tokens
from runtime.token_ids import TokenIds


class Stream:
    """One request's parts, from its queue to a transport that forgets what it is given."""

    def __init__(self, context: Context, generation: Generation, submission: Submission) -> None:
        tokenizer = context.tokenizer
        output = ChatOutput(tokenizer, TextRules(), ParserStart(StartState.CONTENT), tools=True)
        self.request_id = submission.submits[0].request_id
        self.generation = generation
        self.reader = Reader(context, submission, generation, [output], arrived=0.0)
        shape = ChatShape(
            response_id=submission.response_id,
            created=submission.created,
            model="paced",
            names=TokenNames(tokenizer, as_ids=False),
            reasoning_fields=("reasoning", "reasoning_content"),
        )
        self.response = ChatResponse(self.reader, submission.submits, shape)
        self.plain = self.reader.plain[0]
        transport = SimpleNamespace(write=len, is_closing=bool, get_write_buffer_size=int)
        request = SimpleNamespace(
            transport=transport, protocol=SimpleNamespace(writing_paused=False), version=HttpVersion11
        )
        pulse = Pulse(generation, 3600.0)
        self.pump = Pump(cast(web.Request, request), generation, self.response, pulse, is_noted=False)


async def start(context: Context, client: NodeEngineClient, number: int) -> Stream:
    submit = Submit(
        request_id=f"chatcmpl-{number:032x}-0000abcd-0",
        prompt_ids=TokenIds((1, 2, 3)),
        sampling=SamplingParams(max_tokens=1 << 19),
    )
    submission = Submission(response_id=submit.request_id, submits=(submit,), choices_per_prompt=1, created=1)
    generation = await Generation.start(client, submission.submits, rank=None, turn=context.turn)
    return Stream(context, generation, submission)


async def best_us(run: Callable[[], object], rounds: int, num_tokens: int) -> float:
    """The fastest round of `run` and what it leaves to the event loop."""
    times = []
    for _ in range(rounds):
        begun = time.process_time_ns()
        run()
        await asyncio.sleep(0)
        times.append(time.process_time_ns() - begun)
    return min(times) / 1000 / num_tokens


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def measure(num_streams: int, rounds: int) -> dict[str, float]:
    tokenizer = Tokenizer(timing_spec(), "timing tokenizer")
    link = EngineLink(ChannelAddress("unused", 0))
    info = EngineInfo(model_id="paced", max_model_len=1 << 20, vocab_size=tokenizer.vocab_size, role="standalone")
    client = NodeEngineClient(info, [link], lambda _: None, recompute=False)
    context = Context(client, tokenizer, ApiSettings(), ApiMetrics(client, "paced", CollectorRegistry()))
    streams = [await start(context, client, number) for number in range(num_streams)]
    token_id = tokenizer.token_id("0000")
    assert token_id is not None
    step = StepOutput(tuple(Tokens(stream.request_id, (token_id,)) for stream in streams))
    data = msgspec.msgpack.encode(step)
    decode = msgspec.msgpack.Decoder(FromEngine).decode

    async def timed(run: Callable[[], object]) -> float:
        return await best_us(run, rounds, num_streams)

    decoding = await timed(lambda: decode(data))
    for stream in streams:
        stream.generation.listen(None, operator.truth)
    finding = await timed(lambda: link.receive(step))
    pumps: list[Awaitable[Any]] = []
    for stream in streams:
        stream.generation.listen(None)
        pumps.append(asyncio.create_task(stream.pump.run(never)))
    link.receive(step)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    now = asyncio.get_running_loop().time()
    framing = await timed(
        lambda: [stream.plain.take(tokens, now) for stream, tokens in zip(streams, step.outputs, strict=True)]
    )
    return {
        "decode the message": decoding,
        "find the request": finding,
        "detokenise, count, time, event": framing,
        "all of it, to the transport": await timed(lambda: link.receive(decode(data))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming_stages", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    print(f"{options.streams} streams, microseconds of CPU per token")
    for name, us in uvloop.run(measure(options.streams, options.rounds)).items():
        print(f"{name:>32} {us:6.2f}")


if __name__ == "__main__":
    main()
