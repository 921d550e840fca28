"""Nodes with the real HTTP surface of `api` and the stand-in engine behind it, joined to a real router."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry

from api.app import build_app
from api.settings import ApiSettings
from node.membership import Membership, MembershipConfig, describe
from router.service import RouterService
from runtime.requests import EngineReady
from tests.api.http.stand_in import StandInEngine
from tests.api.http.tiny_tokenizer import tiny_tokenizer
from tests.router.harness import settings


class ScriptedEngine(StandInEngine):
    def only_script(self, text: str) -> None:
        """Play this to the next request, whatever was to be played before."""
        self._scripts.clear()
        self.script(text)


class SurfaceNode:
    """One node. States do not move: the stand-in engine of a decode node computes what a script or a hash says."""

    def __init__(self, role: str, node_id: str, router: str, api: ApiSettings) -> None:
        self.node_id = node_id
        self.engine = ScriptedEngine(tiny_tokenizer(), role=role)
        self.engine.info = msgspec.structs.replace(self.engine.info, node_id=node_id)
        self.url = ""
        self._role = role
        self._router = router
        self._app = build_app(self.engine, self.engine.tokenizer, api, CollectorRegistry())

    async def start(self) -> None:
        self._runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        ready = EngineReady(
            rank=0, epoch="0" * 32, handoff_address="127.0.0.1:1", format_digest="f0", format_summary="",
            max_model_len=self.engine.info.max_model_len, num_pages=1, num_slots=1,
        )  # fmt: skip
        join = describe(
            node_id=self.node_id,
            role=self._role,  # type: ignore[arg-type]
            http_url=self.url,
            model_id=self.engine.info.model_id,
            ranks=[ready],
        )
        config = MembershipConfig(routers=(self._router,), first_retry_s=0.05, max_retry_s=0.2)
        self.membership = Membership(config, join, self.engine.ranks, self.engine.release)
        self._member = asyncio.create_task(self.membership.run())

    async def stop(self) -> None:
        """Leave the router and stop serving."""
        self._member.cancel()
        await asyncio.gather(self._member, return_exceptions=True)
        await self._runner.cleanup()


class SurfaceCluster:
    """A router, one prefill node `p0`, and decode nodes `d0`, `d1`, ..."""

    def __init__(self, service: RouterService, prefill: SurfaceNode, decodes: list[SurfaceNode]) -> None:
        self.service = service
        self.prefill = prefill
        self.decodes = decodes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.port}"

    def script(self, text: str) -> None:
        """What the next request generates, whichever decode node gets it."""
        for node in (self.prefill, *self.decodes):
            node.engine.only_script(text)

    def prompt(self) -> str:
        """The prompt of the last request that a decode node got, which must be the one its prefill got."""
        submits = [node.engine.submitted[-1] for node in self.decodes if node.engine.submitted]
        prefilled = self.prefill.engine.submitted[-1].prompt_ids
        assert any(submit.prompt_ids == prefilled for submit in submits)
        return self.prefill.engine.tokenizer.decode(prefilled, skip_special=False)

    async def until_known(self, count: int) -> None:
        """Wait until the router knows this many nodes."""
        async with asyncio.timeout(30):
            while len(list(self.service.registry.nodes)) != count:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def surface_cluster(num_decodes: int = 2, api: ApiSettings | None = None) -> AsyncIterator[SurfaceCluster]:
    """Start it, and wait until all nodes have joined."""
    service = RouterService(settings())
    stopping, started = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(service.run(stopping, lambda _: started.set()))
    await asyncio.wait_for(started.wait(), 30)
    router = f"127.0.0.1:{service.cluster_port}"
    api = api or ApiSettings()
    prefill = SurfaceNode("prefill", "p0", router, api)
    decodes = [SurfaceNode("decode", f"d{number}", router, api) for number in range(num_decodes)]
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.wait_for, running, 30)
        stack.callback(stopping.set)
        for node in (prefill, *decodes):
            await node.start()
            stack.push_async_callback(node.stop)
        cluster = SurfaceCluster(service, prefill, decodes)
        await cluster.until_known(1 + num_decodes)
        yield cluster
