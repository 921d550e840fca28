"""A real router on real sockets with stand-in nodes, in one event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec

from router.config import RouterConfig
from router.service import RouterService
from runtime.config import convert
from tests.router.stand_in_nodes import StandInNode, World, many


def settings(**sections: dict[str, Any]) -> RouterConfig:
    """A configuration for tests: free ports, quick, no canary unless asked for."""
    data: dict[str, Any] = {
        "server": {"port": 0, "drain_s": 5.0},
        "cluster": {"port": 0, "heartbeat_s": 0.1, "missed_heartbeats": 30},
        "requests": {"retry_backoff_s": 0.01, "suspect_s": 0.2},
        "health": {"canary": False},
    }
    for name, values in sections.items():
        if isinstance(values, dict):
            data[name] = {**data.get(name, {}), **values}
        else:
            data[name] = values
    return convert(data, RouterConfig, where="test")


class Cluster:
    """A running router, its nodes, and a client."""

    def __init__(self, service: RouterService, nodes: list[StandInNode], client: aiohttp.ClientSession) -> None:
        self.service = service
        self.nodes = nodes
        self.client = client
        self.stopping = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.port}"

    @property
    def prefills(self) -> list[StandInNode]:
        return [node for node in self.nodes if node.role == "prefill"]

    @property
    def decodes(self) -> list[StandInNode]:
        return [node for node in self.nodes if node.role == "decode"]

    async def complete(self, **body: Any) -> tuple[int, dict[str, Any]]:
        """POST /v1/completions, not streamed. Returns the status and the body."""
        async with self.client.post(f"{self.url}/v1/completions", json={"prompt": "a b c", **body}) as response:
            return response.status, await response.json()

    async def stream(self, **body: Any) -> tuple[int, bytes]:
        """POST /v1/completions, streamed. Returns the status and all bytes."""
        payload = {"prompt": "a b c", "stream": True, **body}
        async with self.client.post(f"{self.url}/v1/completions", json=payload) as response:
            return response.status, await response.read()

    async def until(self, condition: Callable[[], Any], within_s: float = 5.0) -> None:
        """Wait for a condition, looking often."""
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)

    async def settle(self) -> None:
        """Wait until nothing runs anywhere, then audit the router and the nodes."""
        await self.until(lambda: not self.service.dispatcher.live and not self.service.running)
        await self.until(lambda: not any(node.running for node in self.nodes))
        await self.until(lambda: not any(node.held for node in self.nodes))
        self.service.check_integrity()
        assert len(self.service.transfers) == 0


@contextlib.asynccontextmanager
async def cluster(
    make_nodes: Callable[[World, tuple[str, ...]], list[StandInNode]], config: RouterConfig | None = None
) -> AsyncIterator[Cluster]:
    """Start a router, then the nodes, and wait until all have joined."""
    service = RouterService(config or settings())
    stopping, started = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(service.run(stopping, lambda _: started.set()))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        waiting.cancel()
        running.result()
    try:
        routers = (f"127.0.0.1:{service.cluster_port}",) if service.cluster_port is not None else ()
        async with many(make_nodes(World(), routers)) as nodes, aiohttp.ClientSession() as client:
            it = Cluster(service, nodes, client)
            if routers:
                await it.until(lambda: all(node.membership.attached for node in nodes))
            it.stopping = stopping
            yield it
    finally:
        stopping.set()
        await running


def pairs_of(prefills: int, decodes: int, **options: Any) -> Callable[[World, tuple[str, ...]], list[StandInNode]]:
    """`prefills` prefill nodes p0.. and `decodes` decode nodes d0.., all with the same options."""

    def make(world: World, routers: tuple[str, ...]) -> list[StandInNode]:
        return [
            StandInNode(world, role, routers=routers, node_id=f"{role[0]}{index}", **options)
            for role, count in (("prefill", prefills), ("decode", decodes))
            for index in range(count)
        ]

    return make


def with_changes(config: RouterConfig, **changes: Any) -> RouterConfig:
    return msgspec.structs.replace(config, **changes)
