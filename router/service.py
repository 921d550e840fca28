"""The router as one object: its parts, wired; started, and ended in an orderly way."""

import asyncio
import logging
import secrets
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from router.app import build_app
from router.cluster_service import start_cluster_server
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.front import Front
from router.health import Canary, Proofs
from router.kept_responses import KeptResponses
from router.legs import LegFactory
from router.metrics import ClusterCollector, RouterMetrics
from router.nodes import Role
from router.picker import Picker
from router.proxy import AnyNode
from router.registry import Registry
from router.static_nodes import Asker, NodeProbe, StaticNodes, TandemProbe
from router.transfers import TransferTable
from router.upstream import Upstream
from router.vllm_nodes import VllmProbe
from runtime.errors import ConfigError, Overloaded

log = logging.getLogger(__name__)


class RouterService:
    """Everything that lives as long as the router. Made on a running event loop."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.router_id = secrets.token_hex(8)
        self.clock: Callable[[], float] = asyncio.get_running_loop().time
        self.stopping = False
        self.running = 0
        """Requests being served, the router's own not counted."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.prometheus = CollectorRegistry()
        self.metrics = RouterMetrics(self.prometheus)
        self.registry = Registry(model=config.model)
        self.upstream = Upstream(connect_s=config.deadlines.connect_s)
        self.transfers = TransferTable(self.clock, self.registry.release)
        self.proofs = Proofs(config.health, self.registry, fallback=config.requests.local_prefill_fallback)
        self.dispatcher = Dispatcher(
            config,
            self.registry,
            Picker(config.requests, self.registry, self.clock),
            LegFactory(self.upstream, config.deadlines, config.node_api_key, self.clock),
            self.transfers,
            self.metrics,
            self.proofs,
            self.clock,
        )
        self.static_nodes = self._static_nodes()
        self.any_node = AnyNode(self.upstream, self.registry, config.node_api_key, self.clock)
        self.kept_responses = KeptResponses(self.upstream, self.registry, config.node_api_key, self.clock)
        self.canary = Canary(config.health, self.proofs, self.registry, self.dispatcher, self.metrics, self.clock)
        self.port = 0
        self.cluster_port: int | None = None
        for collector in (GCCollector, PlatformCollector, ProcessCollector):
            collector(registry=self.prometheus)
        self.prometheus.register(
            ClusterCollector(
                self.registry,
                self.transfers,
                lambda: self.dispatcher.live,
                lambda: self.running,
                lambda: self.proofs.healthy(self.clock()),
            )
        )

    def enter(self) -> None:
        """Count one request in; `leave` counts it out. Raises Overloaded at the bound, and then it is not in."""
        if self.running >= self.config.server.max_concurrent_requests:
            raise Overloaded(f"The router already serves {self.running} requests, its limit.")
        self.running += 1
        self._idle.clear()

    def leave(self) -> None:
        self.running -= 1
        if not self.running:
            self._idle.set()

    async def run(self, stopping: asyncio.Event, started: Callable[["RouterService"], None] = lambda _: None) -> None:
        """Serve until `stopping` is set, let running requests finish, and end."""
        server_config = self.config.server
        runner = web.AppRunner(
            build_app(self),
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=server_config.keepalive_s,
            shutdown_timeout=0.0,
        )
        await runner.setup()
        assert runner.server is not None
        front = Front(self, runner.server)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.upstream.run(), name="upstream deadlines"),
                group.create_task(front.run(), name="idle clients"),
            ]
            cluster = None
            try:
                if self.config.cluster.port is not None:
                    cluster, self.cluster_port = await start_cluster_server(
                        self.config.cluster, self.registry, self.router_id, self.clock
                    )
                if self.config.health.canary:
                    tasks.append(group.create_task(self.canary.run(), name="canary"))
                if self.static_nodes is not None:
                    tasks.append(group.create_task(self.static_nodes.run(), name="static nodes"))
                server = await self._listen(front)
                log.info(
                    "router %s: http on %s:%d, nodes on %s",
                    self.router_id,
                    server_config.host,
                    self.port,
                    "static lists only" if self.cluster_port is None else f"port {self.cluster_port}",
                )
                started(self)
                await stopping.wait()
                self.stopping = True
                server.close()
                front.close_idle()
                await self._drain()
            finally:
                await front.close()
                await runner.cleanup()
                if cluster is not None:
                    await cluster.stop(grace=0.5)
                for task in tasks:
                    task.cancel()

    def _static_nodes(self) -> StaticNodes | None:
        config = self.config.nodes
        asker = Asker(config, self.upstream, self.config.node_api_key, self.clock)
        probes: list[tuple[str, NodeProbe]] = []
        for role, listed in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode)):
            for node in listed:
                if config.dialect == "tandem":
                    probes.append((node.url, TandemProbe(node, role, asker)))
                    continue
                probe = VllmProbe(node, role, asker, config, self.registry, self.clock)
                self.dispatcher.on_load_failure.append(probe.forget)
                probes.append((node.url, probe))
        return StaticNodes(config, self.registry, probes, self.clock) if probes else None

    async def _listen(self, front: Front) -> asyncio.Server:
        config = self.config.server
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(front, config.host, config.port, backlog=1024)
        except OSError as error:
            raise ConfigError(f"server: cannot listen on {config.host}:{config.port}: {error.strerror}") from None
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _drain(self) -> None:
        """Wait for running requests, at most `drain_s`."""
        if self.running:
            log.info("draining: %d requests are running", self.running)
        limit_s = self.config.server.drain_s
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests did not end within %g s and are cut off", self.running, limit_s)

    def check_integrity(self) -> None:
        """Raises AssertionError if anything leaked."""
        self.transfers.check_integrity(self.dispatcher.live)
        self.upstream.check_integrity()
        if not self.dispatcher.live:
            for node in self.registry.nodes:
                assert not node.calls, f"node {node.info.node_id} has calls but no request is running"
                counts = {target.name: target.in_flight for target in node.targets}
                assert not any(counts.values()), f"legs are counted as running: {counts}"
