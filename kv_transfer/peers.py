"""The decode end of the conversations: one link per prefill rank and epoch, opened when first needed."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from kv_transfer.config import TransferConfig
from kv_transfer.hello import disagreement
from kv_transfer.lane import Lane, LaneError, open_lane
from kv_transfer.messages import Hello, ToPrefill
from kv_transfer.receiver import Receiver
from kv_transfer.wire import WireError, decode_to_decode, encode_to_prefill, parse
from proto import handoff_pb2 as pb
from proto import handoff_pb2_grpc as pb_grpc
from runtime.errors import ConfigError
from runtime.grpc import open_channel

log = logging.getLogger(__name__)


class _Refused(Exception):
    """The peer is there, but it is not one we can fetch from."""

    def __init__(self, reason: str, *, retryable: bool) -> None:
        super().__init__(reason)
        self.retryable = retryable


class PeerLink:
    """A stream and a lane to one incarnation of a prefill rank."""

    def __init__(self, address: str, epoch: str) -> None:
        self.address = address
        self.epoch = epoch
        """The incarnation asked for; empty accepts any."""
        self.hello: Hello | None = None
        self.lane: Lane | None = None
        self.is_open = False
        self.closed = asyncio.Event()
        """It has to end."""

    def send(self, message: ToPrefill) -> None:
        if self.is_open and self.lane is not None:
            self.lane.send(encode_to_prefill(message).SerializeToString())

    def close(self) -> None:
        self.closed.set()


class Peers:
    """Owns all links. `probe(session_id)` says what is wrong with the peer's data path, None if nothing is."""

    def __init__(
        self,
        config: TransferConfig,
        receiver: Receiver,
        *,
        my_hello: Callable[[], Hello],
        probe: Callable[[str], Awaitable[str | None]],
        spawn: Callable[..., object],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._receiver = receiver
        self._my_hello = my_hello
        self._probe = probe
        self._spawn = spawn
        self._clock = clock
        self._links: dict[tuple[str, str], PeerLink] = {}
        self._not_before: dict[str, float] = {}
        self.running = 0
        """Links that have not ended, closed ones included."""

    def link_to(self, address: str, epoch: str) -> PeerLink:
        """The link to that incarnation, open or being opened. The receiver hears what becomes of it."""
        link = self._links.get((address, epoch))
        if link is None:
            link = self._links[address, epoch] = PeerLink(address, epoch)
            self._spawn(self._run(link), f"link {address}")
        return link

    @property
    def num_links(self) -> int:
        return sum(link.is_open for link in self._links.values())

    def close_all(self) -> None:
        """Every link ends; whoever needs one from now on gets a new one."""
        for link in self._links.values():
            link.close()
        self._links.clear()

    async def _run(self, link: PeerLink) -> None:
        reason, refused = "the agent is stopping", None
        self.running += 1
        try:
            await self._back_off(link.address)
            reason = await self._converse(link)
        except _Refused as error:
            reason, refused = str(error), error
        except (grpc.aio.AioRpcError, TimeoutError, WireError, LaneError, ConfigError) as error:
            reason = _explain(link.address, error)
        finally:
            link.is_open = False
            self.running -= 1
            if self._links.get((link.address, link.epoch)) is link:
                del self._links[link.address, link.epoch]
            self._not_before[link.address] = self._clock() + self._config.peer_backoff_s
            log.info("link to prefill rank %s ended: %s", link.address, reason)
            if refused is not None:
                self._receiver.on_link_refused(link, reason, refused.retryable)
            else:
                self._receiver.on_link_lost(link, reason)
            if link.hello is not None:
                self._receiver.reader.forget(link.hello.session_id)

    async def _back_off(self, address: str) -> None:
        now = self._clock()
        self._not_before = {peer: until for peer, until in self._not_before.items() if until > now}
        await asyncio.sleep(max(0.0, self._not_before.get(address, now) - now))

    async def _converse(self, link: PeerLink) -> str:
        """Returns why the conversation ended."""
        channel = open_channel(link.address, self._config.tls)
        try:
            stub = pb_grpc.HandoffStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Converse()
            try:
                async with asyncio.timeout(self._config.connect_timeout_s):
                    await call.write(encode_to_prefill(self._my_hello()))
                    link.hello = await self._greet(link, call)
                    link.lane = await self._open_lane(link, link.hello)
                await self._reach(link.hello)
                link.is_open = True
                log.info("link to prefill rank %s open (epoch %s)", link.address, link.hello.epoch[:8])
                self._receiver.on_link_open(link)
                await self._listen(link, link.lane, call)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise _Refused(f"{link.address}: {error.details()}", retryable=False) from None
                raise
            finally:
                if link.lane is not None:
                    link.lane.close()
                call.cancel()
        finally:
            await channel.close()
        return f"the prefill rank {link.address} closed the stream"

    async def _open_lane(self, link: PeerLink, hello: Hello) -> Lane:
        host, _, _ = link.address.rpartition(":")
        try:
            return await open_lane(host, hello.lane_port, hello.lane_key, self._config.tls)
        except OSError as error:
            raise LaneError(f"no lane to {host}:{hello.lane_port}: {error}") from None

    async def _listen(self, link: PeerLink, lane: Lane, call: Any) -> None:
        """Until the peer ends stream or lane, or the link is to be closed."""
        ends = asyncio.create_task(self._end_of(call))
        tasks = [ends, *(asyncio.create_task(event.wait()) for event in (lane.over, link.closed))]
        lane.listen(lambda frame: self._receiver.on_message(link, decode_to_decode(parse(pb.ToDecode, frame))))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            link.is_open = False
            lane.close()
            if lane.failure is not None:
                raise lane.failure
            # The peer ends the stream once it has heard everything; if it was first, it says why.
            async with asyncio.timeout(self._config.connect_timeout_s):
                await ends
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _end_of(self, call: Any) -> None:
        """Returns when the peer ends the stream, raises what broke it."""
        if await call.read() is not grpc.aio.EOF:
            raise WireError("after Hello, the lane is where to speak")

    async def _greet(self, link: PeerLink, call: Any) -> Hello:
        message = await call.read()
        if message is grpc.aio.EOF:
            raise WireError("the stream ended before Hello")
        theirs = decode_to_decode(message)
        if not isinstance(theirs, Hello):
            raise WireError(f"{type(theirs).__name__} before Hello")
        reason = disagreement(self._my_hello(), theirs)
        if reason is not None:
            raise _Refused(reason, retryable=False)
        if link.epoch not in ("", theirs.epoch):
            raise _Refused(
                f"epoch {link.epoch} of {link.address} is over, the rank is at {theirs.epoch}", retryable=True
            )
        return theirs

    async def _reach(self, hello: Hello) -> None:
        """The control channel alone proves nothing about the data path."""
        problem = await self._probe(hello.session_id)
        if problem is not None:
            raise _Refused(problem, retryable=True)


def _explain(address: str, error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"stream to the prefill rank {address}: {error.code().name}: {error.details()}"
    return f"prefill rank {address}: {error or type(error).__name__}"
