"""A node's place in the cluster: one stream to every router it is told about, kept open for as long as the node lives.

Serving never waits for any of this. A router that is away is dialled again with growing, jittered pauses; a router that
refuses the node is asked again too, slowly, because what it compared with may have left.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import grpc.aio
import msgspec
from google.protobuf import json_format

from proto import cluster_pb2 as pb
from proto import cluster_pb2_grpc
from runtime import grpc as rpc
from runtime.requests import EngineReady, EngineStats, EpochChanged

log = logging.getLogger(__name__)

_FAREWELL_S = 0.5
"""A router that does not hear the farewell in this time notices the end of the stream anyway."""


class MembershipConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """YAML section `membership` of a node."""

    routers: tuple[str, ...] = ()
    """host:port of each router's cluster service. Empty: the node waits to be found (`--prefill`, `--decode`)."""
    heartbeat_s: float = 1.0
    """Until a router says how often it wants to hear."""
    connect_s: float = 5.0
    """For a router to answer a join."""
    first_retry_s: float = 0.2
    max_retry_s: float = 5.0
    tls: rpc.TlsConfig | None = None

    def __post_init__(self) -> None:
        for router in self.routers:
            host, separator, port = router.rpartition(":")
            if not separator or not host or not port.isdigit():
                raise ValueError(f"membership.routers: {router!r} is not host:port")
        for field in ("heartbeat_s", "connect_s", "first_retry_s", "max_retry_s"):
            if not getattr(self, field) > 0:
                raise ValueError(f"membership.{field}={getattr(self, field)}: expected a positive number")


def describe(
    *,
    node_id: str,
    role: Literal["prefill", "decode"],
    http_url: str,
    model_id: str,
    ranks: Sequence[EngineReady],
    bootstrap_port: int = 0,
    local_prefill: bool = False,
    version: str = "",
) -> pb.Join:
    """What this node says about itself, from its ready engines (at least one, all of one format)."""
    first = ranks[0]
    for ready in ranks:
        assert ready.format_digest == first.format_digest, (
            f"rank {ready.rank} has format {ready.format_summary}, rank {first.rank} has {first.format_summary}"
        )
    return pb.Join(
        node_id=node_id,
        role=pb.PREFILL if role == "prefill" else pb.DECODE,
        http_url=http_url,
        model_id=model_id,
        format_digest=first.format_digest,
        format_summary=first.format_summary,
        max_model_len=min(ready.max_model_len for ready in ranks),
        ranks=[pb.Rank(rank=r.rank, epoch=r.epoch, handoff_address=r.handoff_address) for r in ranks],
        bootstrap_port=bootstrap_port,
        local_prefill=local_prefill,
        version=version,
    )


def as_json(join: pb.Join) -> dict[str, Any]:
    """The body of `GET /cluster/node`."""
    return json_format.MessageToDict(join, preserving_proto_field_name=True)


def load_of(stats: EngineStats) -> pb.RankLoad:
    return pb.RankLoad(
        rank=stats.rank,
        running=stats.running,
        waiting=stats.waiting,
        receiving=stats.receiving,
        held=stats.held,
        queued_prompt_tokens=stats.queued_prompt_tokens,
        pages_total=stats.pages_total,
        pages_free=stats.pages_free,
        slots_total=stats.slots_total,
        slots_free=stats.slots_free,
    )


class Membership:
    """Keeps the node attached to its routers. `run` is a child of the node's task group; call the rest at any time."""

    def __init__(
        self,
        config: MembershipConfig,
        join: pb.Join,
        stats: Callable[[], Sequence[EngineStats]],
        on_release: Callable[[str], None],
        health: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`stats` and `health` are read at each heartbeat; `on_release` gets the transfer ids routers gave up."""
        self._config = config
        self.join = pb.Join()
        self.join.CopyFrom(join)
        self._stats = stats
        self._on_release = on_release
        self._health = health
        self._draining = False
        self._sequence = 0
        self._attachments = [_Attachment(self, router) for router in config.routers]

    @property
    def attached(self) -> list[str]:
        """Addresses of the routers that have welcomed this node and still hold its stream."""
        return [attachment.router for attachment in self._attachments if attachment.welcomed]

    async def run(self) -> None:
        """Stay attached to every router until cancelled, then take leave."""
        async with asyncio.TaskGroup() as group:
            for attachment in self._attachments:
                group.create_task(attachment.run(), name=f"membership {attachment.router}")

    def epoch_changed(self, event: EpochChanged) -> None:
        """A rank re-created its transfer engine: routers learn it now, later joins say it from the start."""
        for rank in self.join.ranks:
            if rank.rank == event.rank:
                rank.epoch, rank.handoff_address = event.epoch, event.handoff_address
                self._say(pb.NodeMessage(epoch_changed=pb.EpochChanged(rank=rank)))
                return
        raise ValueError(f"epoch of rank {event.rank}, but this node has ranks {[r.rank for r in self.join.ranks]}")

    def drain(self) -> None:
        """Ask every router, now and whenever one comes back, to send no new work."""
        self._draining = True
        self._say(pb.NodeMessage(draining=pb.Draining()))

    def beat_now(self) -> None:
        """Report at once instead of at the next heartbeat: something changed that matters for routing."""
        self._say(self.heartbeat())

    def heartbeat(self) -> pb.NodeMessage:
        self._sequence += 1
        return pb.NodeMessage(
            heartbeat=pb.Heartbeat(
                sequence=self._sequence,
                loads=[load_of(stats) for stats in self._stats()],
                trouble=self._health() or "",
            )
        )

    def _say(self, message: pb.NodeMessage) -> None:
        for attachment in self._attachments:
            if attachment.welcomed:
                attachment.outbox.put_nowait(message)

    def greeting(self) -> list[pb.NodeMessage]:
        """What a router that just welcomed this node is told first."""
        draining = [pb.NodeMessage(draining=pb.Draining())] if self._draining else []
        return [self.heartbeat(), *draining]

    def released(self, transfer_id: str) -> None:
        self._on_release(transfer_id)


class _Refused(Exception):
    """The router said no."""


class _Attachment:
    """The stream to one router, dialled again and again."""

    def __init__(self, membership: Membership, router: str) -> None:
        self.router = router
        self.welcomed = False
        self.outbox: asyncio.Queue[pb.NodeMessage | None] = asyncio.Queue()
        self._membership = membership
        self._config = membership._config
        self._last_failure = ""
        self._pause_s = self._config.first_retry_s

    async def run(self) -> None:
        while True:
            try:
                await self._attach()
                failure = "the router ended the stream"
            except _Refused as refusal:
                failure, self._pause_s = f"refused: {refusal}", self._config.max_retry_s
            except TimeoutError:
                failure = f"no answer within {self._config.connect_s:g} s"
            except (grpc.RpcError, grpc.aio.BaseError) as error:
                details = error.details() if isinstance(error, grpc.aio.AioRpcError) else repr(error)
                failure = details or "the stream broke"
            finally:
                self.welcomed = False
            if failure != self._last_failure:
                log.warning("router %s: %s; trying again", self.router, failure)
                self._last_failure = failure
            await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
            self._pause_s = min(2 * self._pause_s, self._config.max_retry_s)

    async def _attach(self) -> None:
        """One stream from Join to its end. Returns when the router ends it."""
        channel = rpc.open_channel(self.router, self._config.tls)
        try:
            call = cluster_pb2_grpc.ClusterStub(channel).Attach()  # type: ignore[no-untyped-call]
            async with asyncio.timeout(self._config.connect_s):
                await call.write(pb.NodeMessage(join=self._membership.join))
                answer = await call.read()
            if answer is grpc.aio.EOF:
                return
            if answer.WhichOneof("kind") == "refused":
                raise _Refused(answer.refused.reason)
            self._greet()
            log.info("attached to router %s at %s", answer.welcome.router_id, self.router)
            heartbeat_s = answer.welcome.heartbeat_s or self._config.heartbeat_s
            await self._converse(call, heartbeat_s)
        finally:
            await channel.close()

    def _greet(self) -> None:
        self._last_failure = ""
        self._pause_s = self._config.first_retry_s
        self.outbox = asyncio.Queue()
        for message in self._membership.greeting():
            self.outbox.put_nowait(message)
        self.welcomed = True

    async def _converse(self, call: Any, heartbeat_s: float) -> None:
        listening = asyncio.create_task(self._listen(call))
        speaking = asyncio.create_task(self._speak(call, heartbeat_s))
        try:
            await asyncio.wait((listening, speaking), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # Cancelling a read or a write would cancel the call, and the farewell with it.
            self.outbox.put_nowait(None)
            await asyncio.wait((listening,), timeout=_FAREWELL_S)
            raise
        finally:
            for task in (listening, speaking):
                task.cancel()
            results = await asyncio.gather(listening, speaking, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _listen(self, call: Any) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            if message.WhichOneof("kind") == "release":
                for transfer_id in message.release.transfer_ids:
                    self._membership.released(transfer_id)

    async def _speak(self, call: Any, heartbeat_s: float) -> None:
        """Send what is queued, and a heartbeat after `heartbeat_s` of silence. None in the queue: say goodbye."""
        while True:
            try:
                async with asyncio.timeout(heartbeat_s):
                    message = await self.outbox.get()
            except TimeoutError:
                message = self._membership.heartbeat()
            if message is None:
                await call.write(pb.NodeMessage(leaving=pb.Leaving(reason="the node stops")))
                await call.done_writing()
                return
            await call.write(message)
