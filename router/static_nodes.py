"""Nodes that do not register: the router asks each of them who it is, again and again, and registers it itself."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from google.protobuf import json_format

from proto import cluster_pb2 as pb
from router.config import NodesConfig, StaticNode
from router.exchange import UpstreamError
from router.nodes import NodeInfo, RankLoad, Refused, Role, node_from_proto
from router.proxy import Proxied, ask
from router.registry import Node, Registry, Release
from router.upstream import Upstream

log = logging.getLogger(__name__)

_FAILURES_TO_LOSE = 2


class NotReady(Exception):
    """The node cannot take work yet, or any more. The message says why."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at a node showed."""

    info: NodeInfo
    loads: tuple[RankLoad, ...] = ()
    draining: bool = False


class Asker:
    """Short questions to nodes over HTTP."""

    def __init__(self, config: NodesConfig, upstream: Upstream, key: str | None, clock: Callable[[], float]) -> None:
        self._timeout_s = config.poll_timeout_s
        self._upstream = upstream
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._clock = clock

    async def get(self, url: str, path: str) -> Proxied:
        """Raises UpstreamError."""
        return await self._ask(url, "GET", path, b"")

    async def post(self, url: str, path: str, body: bytes) -> Proxied:
        """Raises UpstreamError."""
        return await self._ask(url, "POST", path, body)

    async def json(self, url: str, path: str) -> Any:
        """The parsed body of a 200. Raises UpstreamError or NotReady."""
        answer = await self.get(url, path)
        if answer.head.status != 200:
            raise NotReady(f"{url}{path} answered {answer.head.status}")
        try:
            return orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            raise NotReady(f"{url}{path} answered something that is not JSON") from None

    async def _ask(self, url: str, method: str, path: str, body: bytes) -> Proxied:
        return await ask(
            self._upstream,
            url,
            method,
            path,
            headers=self._headers,
            body=body,
            timeout_s=self._timeout_s,
            clock=self._clock,
        )


class NodeProbe(Protocol):
    """How one kind of node is asked. One probe per static node."""

    async def look(self) -> Seen:
        """Raises UpstreamError or NotReady."""

    async def release(self, release: Release) -> None:
        """Pass on that a transfer was given up. Raises UpstreamError or NotReady."""


class TandemProbe:
    """A Tandem node: it describes itself at /cluster/node and its ranks at /cluster/ranks."""

    def __init__(self, node: StaticNode, role: Role, asker: Asker) -> None:
        self._url = node.url.rstrip("/")
        self._role = role
        self._asker = asker

    async def look(self) -> Seen:
        description = await self._asker.json(self._url, "/cluster/node")
        try:
            join = json_format.ParseDict(description, pb.Join(), ignore_unknown_fields=True)
            # The address it gives is for its own network; this one is known to lead there.
            join.http_url = self._url
            info = node_from_proto(join)
        except (json_format.ParseError, Refused) as error:
            raise NotReady(f"{self._url}/cluster/node: {error}") from None
        if info.role is not self._role:
            raise NotReady(f"{self._url} is listed as {self._role.value} and says it is {info.role.value}")
        health = await self._asker.get(self._url, "/health")
        if health.head.status != 200:
            raise NotReady(f"{self._url}/health answered {health.head.status}")
        ranks = await self._asker.json(self._url, "/cluster/ranks")
        rows = [row for row in ranks if isinstance(row, dict)] if isinstance(ranks, list) else []
        names = RankLoad.__slots__
        loads = tuple(RankLoad(**{name: row[name] for name in names}) for row in rows if row.keys() >= set(names))
        return Seen(info, loads, draining=bool(rows) and all(row.get("draining") for row in rows))

    async def release(self, release: Release) -> None:
        await self._asker.post(self._url, "/cluster/release", orjson.dumps({"transfer_id": release.transfer_id}))


class _HttpLink:
    """The way to a node that keeps no stream open. Releases queue here; the node's own task sends them."""

    def __init__(self) -> None:
        self.releases: asyncio.Queue[Release] = asyncio.Queue()

    def release(self, release: Release) -> None:
        self.releases.put_nowait(release)

    def close(self, reason: str) -> None:
        """Nothing to close."""


class StaticNodes:
    """Keeps the registry up to date about every listed node."""

    def __init__(
        self,
        config: NodesConfig,
        registry: Registry,
        probes: list[tuple[str, NodeProbe]],
        clock: Callable[[], float],
    ) -> None:
        """`probes`: for each listed node its URL and how to ask it."""
        self._config = config
        self._registry = registry
        self._probes = probes
        self._clock = clock

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for url, probe in self._probes:
                link = _HttpLink()
                group.create_task(self._watch(url, probe, link), name=f"watch {url}")
                group.create_task(self._send_releases(url, probe, link), name=f"releases {url}")

    async def _watch(self, url: str, probe: NodeProbe, link: _HttpLink) -> None:
        node: Node | None = None
        failures = 0
        said = ""
        while True:
            try:
                seen = await probe.look()
                node = self._update(node, seen, link)
                failures, said = 0, ""
            except (UpstreamError, NotReady, Refused) as error:
                failures += 1
                if str(error) != said:
                    said = str(error)
                    log.warning("static node %s: %s", url, said)
                if node is not None and (failures >= _FAILURES_TO_LOSE or isinstance(error, NotReady)):
                    self._registry.lose(node, said)
                    node = None
            # One failure is looked at again soon: it decides whether requests wait or go elsewhere.
            await asyncio.sleep(self._config.poll_s if not failures else min(0.2, self._config.poll_s))

    def _update(self, node: Node | None, seen: Seen, link: _HttpLink) -> Node:
        now = self._clock()
        if node is None or node.lost is not None or _without_ranks(node) != _without_ranks_of(seen.info):
            if node is not None:
                self._registry.lose(node, "it changed what it is")
            node = self._registry.join(seen.info, link, now)
        else:
            for target, rank in zip(node.targets, seen.info.ranks, strict=True):
                if target.info != rank:
                    self._registry.epoch_changed(node, rank)
        self._registry.heartbeat(node, seen.loads, "", now)
        if seen.draining:
            self._registry.drain(node)
        return node

    async def _send_releases(self, url: str, probe: NodeProbe, link: _HttpLink) -> None:
        while True:
            release = await link.releases.get()
            try:
                await probe.release(release)
            except (UpstreamError, NotReady) as error:
                log.warning("static node %s: release of %s failed: %s", url, release.transfer_id, error)


def _without_ranks(node: Node) -> object:
    return _without_ranks_of(node.info)


def _without_ranks_of(info: NodeInfo) -> object:
    """What may not change while a node stays the same node."""
    return info.node_id, info.role, info.url, info.model_id, info.format_digest, [rank.rank for rank in info.ranks]
