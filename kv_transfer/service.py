"""The prefill end of the control streams: one conversation per decode rank that opened one."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from kv_transfer.hello import disagreement
from kv_transfer.messages import Hello, ToDecode
from kv_transfer.sender import Sender
from kv_transfer.wire import WireError, decode_to_prefill, encode_to_decode
from proto import handoff_pb2 as pb
from proto import handoff_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)


class PeerStream:
    """One decode rank's stream. Messages are written in order by one task."""

    def __init__(self, hello: Hello) -> None:
        self.hello = hello
        self.outbox: asyncio.Queue[ToDecode] = asyncio.Queue()
        self.closed = asyncio.Event()

    def send(self, message: ToDecode) -> None:
        if not self.closed.is_set():
            self.outbox.put_nowait(message)


class HandoffService(pb_grpc.HandoffServicer):
    """Serves claims for the transfers of `sender`."""

    def __init__(self, sender: Sender, my_hello: Callable[[], Hello], hello_timeout_s: float) -> None:
        self._sender = sender
        self._my_hello = my_hello
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
            await self._converse(stream, request_iterator, context)
            if stream.closed.is_set():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "this rank's epoch is over")
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            stream.closed.set()
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
                    await context.write(encode_to_decode(mine))
                    return PeerStream(theirs)
                problem, code = reason, grpc.StatusCode.FAILED_PRECONDITION
        except TimeoutError:
            problem = f"no Hello within {self._hello_timeout_s} s"
        except StopAsyncIteration:
            pass
        except WireError as error:
            problem = str(error)
        log.warning("decode rank %s refused: %s", context.peer(), problem)
        await context.abort(code, problem)
        raise AssertionError("abort returned")

    async def _converse(
        self,
        stream: PeerStream,
        request_iterator: AsyncIterator[pb.ToPrefill],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Until the peer ends the stream or `closed` is set."""

        async def listen() -> None:
            async for message in request_iterator:
                heard = decode_to_prefill(message)
                if isinstance(heard, Hello):
                    raise WireError("a second Hello")
                self._sender.on_message(stream, heard)

        async def speak() -> None:
            while True:
                await context.write(encode_to_decode(await stream.outbox.get()))

        tasks = [asyncio.create_task(work) for work in (listen(), speak(), stream.closed.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
