"""The prefill end of the conversations: one stream and lane per decode rank that opened one."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import msgspec

from kv_transfer.hello import disagreement
from kv_transfer.lane import Lane, LaneError, Lanes
from kv_transfer.messages import Hello, ToDecode
from kv_transfer.sender import Sender
from kv_transfer.wire import WireError, decode_to_prefill, encode_to_decode, parse
from proto import handoff_pb2 as pb
from proto import handoff_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)


class PeerStream:
    """One decode rank's end of the conversation."""

    def __init__(self, hello: Hello, lane: Lane) -> None:
        self.hello = hello
        self.lane = lane
        self.closed = asyncio.Event()

    def send(self, message: ToDecode) -> None:
        self.lane.send(encode_to_decode(message).SerializeToString())


class HandoffService(pb_grpc.HandoffServicer):
    """Serves claims for the transfers of `sender`."""

    def __init__(self, sender: Sender, my_hello: Callable[[], Hello], lanes: Lanes, hello_timeout_s: float) -> None:
        self._sender = sender
        self._my_hello = my_hello
        self._lanes = lanes
        self._hello_timeout_s = hello_timeout_s
        self._streams: set[PeerStream] = set()

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def close_streams(self) -> None:
        """Our epoch is over: peers must introduce themselves again."""
        for stream in self._streams:
            stream.closed.set()

    async def Converse(
        self, request_iterator: AsyncIterator[pb.ToPrefill], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        stream = await self._greet(request_iterator, context)
        self._streams.add(stream)
        log.info("decode rank %s joined (epoch %s)", context.peer(), stream.hello.epoch[:8])
        try:
            await self._converse(stream, request_iterator)
            if stream.closed.is_set():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "this rank's epoch is over")
        except (WireError, LaneError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            stream.lane.close()
            self._streams.discard(stream)
            log.info("decode rank %s left", context.peer())
            self._sender.on_stream_lost(stream)

    async def _greet(
        self, request_iterator: AsyncIterator[pb.ToPrefill], context: grpc.aio.ServicerContext[Any, Any]
    ) -> PeerStream:
        problem = "the stream must begin with Hello"
        code = grpc.StatusCode.INVALID_ARGUMENT
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                theirs = decode_to_prefill(await anext(aiter(request_iterator)))
            if isinstance(theirs, Hello):
                mine = self._my_hello()
                reason = disagreement(mine, theirs)
                if reason is None:
                    return PeerStream(theirs, await self._meet(mine, context))
                problem, code = reason, grpc.StatusCode.FAILED_PRECONDITION
        except TimeoutError:
            problem = f"no Hello within {self._hello_timeout_s} s"
        except StopAsyncIteration:
            pass
        except (WireError, LaneError) as error:
            problem = str(error)
        log.warning("decode rank %s refused: %s", context.peer(), problem)
        await context.abort(code, problem)
        raise AssertionError("abort returned")

    async def _meet(self, mine: Hello, context: grpc.aio.ServicerContext[Any, Any]) -> Lane:
        """Say Hello; the lane that the peer then opens. LaneError if it does not."""
        with self._lanes.expect() as (key, coming):
            hello = msgspec.structs.replace(mine, lane_port=self._lanes.port, lane_key=key)
            await context.write(encode_to_decode(hello))
            try:
                async with asyncio.timeout(self._hello_timeout_s):
                    return await coming
            except TimeoutError:
                raise LaneError(f"no lane within {self._hello_timeout_s} s of Hello") from None

    async def _converse(self, stream: PeerStream, request_iterator: AsyncIterator[pb.ToPrefill]) -> None:
        """Until the peer ends stream or lane, or `closed` is set."""

        def hear(frame: bytes) -> None:
            heard = decode_to_prefill(parse(pb.ToPrefill, frame))
            if isinstance(heard, Hello):
                raise WireError("a second Hello")
            self._sender.on_message(stream, heard)

        async def watch() -> None:
            async for _ in request_iterator:
                raise WireError("after Hello, the lane is where to speak")

        tasks = [asyncio.create_task(work) for work in (watch(), stream.lane.over.wait(), stream.closed.wait())]
        stream.lane.listen(hear)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if stream.lane.failure is not None:
                raise stream.lane.failure
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
