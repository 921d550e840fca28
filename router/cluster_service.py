"""The gRPC service nodes attach to: one stream per node, for as long as it is a member."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc.aio

from proto import cluster_pb2 as pb
from proto import cluster_pb2_grpc
from router.config import ClusterConfig
from router.nodes import Refused, load_from_proto, node_from_proto, rank_from_proto
from router.registry import Node, Registry, Release
from runtime import grpc as rpc

log = logging.getLogger(__name__)

_RELEASES_AT_ONCE = 1024

_Context = Any
"""grpc.aio.ServicerContext: its stubs know neither EOF nor streams read by hand."""


class _StreamLink:
    """The way back to one node. Once the stream ended nothing needs saying: the node forgets by itself."""

    def __init__(self) -> None:
        self.releases: list[Release] = []
        self.closed: str | None = None
        self.changed = asyncio.Event()

    def release(self, release: Release) -> None:
        self.releases.append(release)
        self.changed.set()

    def close(self, reason: str) -> None:
        self.closed = reason
        self.changed.set()


class ClusterService(cluster_pb2_grpc.ClusterServicer):
    """Turns streams into registry calls."""

    def __init__(self, config: ClusterConfig, registry: Registry, router_id: str, clock: Callable[[], float]) -> None:
        self._config = config
        self._registry = registry
        self._router_id = router_id
        self._clock = clock

    async def Attach(self, request_iterator: Any, context: _Context) -> None:
        """One node, from Join to the end of its stream."""
        peer = context.peer()
        try:
            async with asyncio.timeout(self._config.join_s):
                first: Any = await context.read()
        except TimeoutError:
            log.warning("%s opened a stream and did not join within %g s", peer, self._config.join_s)
            return
        if first is grpc.aio.EOF:
            return
        link = _StreamLink()
        try:
            if first.WhichOneof("kind") != "join":
                raise Refused(f"the first message was {first.WhichOneof('kind')}, expected join")
            node = self._registry.join(node_from_proto(first.join), link, self._clock())
        except Refused as refusal:
            log.warning("refused %s: %s", peer, refusal)
            await context.write(pb.RouterMessage(refused=pb.Refused(reason=str(refusal))))
            return
        reason = "its stream ended"
        try:
            welcome = pb.Welcome(router_id=self._router_id, heartbeat_s=self._config.heartbeat_s)
            await context.write(pb.RouterMessage(welcome=welcome))
            reason = await self._converse(node, link, context)
        finally:
            self._registry.lose(node, reason)
            for release in link.releases:
                self._registry.release(node, release)

    async def _converse(self, node: Node, link: _StreamLink, context: _Context) -> str:
        """Listen and speak until either side ends it. Returns why."""
        listening = asyncio.create_task(self._listen(node, context))
        speaking = asyncio.create_task(self._speak(link, context))
        try:
            await asyncio.wait((listening, speaking), return_when=asyncio.FIRST_COMPLETED)
            first = listening if listening.done() else speaking
            try:
                return first.result()
            except (grpc.RpcError, grpc.aio.BaseError) as error:
                return f"its stream broke: {error}"
        finally:
            for task in (listening, speaking):
                task.cancel()
            await asyncio.gather(listening, speaking, return_exceptions=True)

    async def _listen(self, node: Node, context: _Context) -> str:
        limit_s = self._config.heartbeat_s * self._config.missed_heartbeats
        while True:
            try:
                async with asyncio.timeout(limit_s):
                    message: Any = await context.read()
            except TimeoutError:
                return f"no heartbeat for {limit_s:g} s"
            if message is grpc.aio.EOF:
                return "its stream ended"
            match message.WhichOneof("kind"):
                case "heartbeat":
                    beat = message.heartbeat
                    loads = [load_from_proto(load) for load in beat.loads]
                    self._registry.heartbeat(node, loads, beat.trouble, self._clock())
                case "epoch_changed":
                    self._registry.epoch_changed(node, rank_from_proto(message.epoch_changed.rank))
                case "draining":
                    self._registry.drain(node)
                case "leaving":
                    return f"it left: {message.leaving.reason or 'no reason given'}"
                case other:
                    return f"it sent {other}, which a joined node does not send"

    async def _speak(self, link: _StreamLink, context: _Context) -> str:
        """Send releases as they come: those that came during one write go out together in the next."""
        while link.closed is None:
            await link.changed.wait()
            link.changed.clear()
            while link.releases:
                batch = link.releases[:_RELEASES_AT_ONCE]
                await context.write(
                    pb.RouterMessage(
                        release=pb.ReleaseTransfers(transfer_ids=[release.transfer_id for release in batch])
                    )
                )
                del link.releases[: len(batch)]
        return link.closed


async def start_cluster_server(
    config: ClusterConfig, registry: Registry, router_id: str, clock: Callable[[], float]
) -> tuple[grpc.aio.Server, int]:
    """Listen for nodes. Returns the server and its port."""
    assert config.port is not None
    server = rpc.open_server()
    service = ClusterService(config, registry, router_id, clock)
    cluster_pb2_grpc.add_ClusterServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = rpc.bind(server, config.host, config.port, config.tls)
    await server.start()
    return server, port
