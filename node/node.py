"""The API process of a node: it owns the engine processes, the HTTP surface and the membership in the cluster.

Start: spawn one engine process per rank, wait until all can take work, open the HTTP port, join the routers.
End: on SIGTERM the node drains (no new work, running streams finish, promised state is fetched); when an engine
process dies the node fails its requests and exits, because its ranks step together and none can go on alone.
"""

import asyncio
import contextlib
import logging
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal

from aiohttp import web
from prometheus_client import CollectorRegistry

from api.app import build_app
from api.backend import EngineInfo
from api.tokenizer import Tokenizer
from model.config import ModelConfig
from node.bootstrap import serve_table
from node.cluster_routes import add_cluster_routes
from node.config import NodeConfig
from node.engine_client import NodeEngineClient
from node.engine_process import EngineProcess
from node.membership import Membership, describe
from node.metrics import NodeMetrics
from node.worker import WorkerSpec, run_rank
from runtime.channel import ChannelAddress
from runtime.errors import ConfigError, ProcessDied

log = logging.getLogger(__name__)

Role = Literal["prefill", "decode", "standalone"]


@contextlib.asynccontextmanager
async def engine_processes(config: NodeConfig, role: Role) -> AsyncIterator[list[EngineProcess]]:
    """All ranks, ready to take work; stopped on the way out."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        group_port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory:
        engines = [
            EngineProcess(
                f"{role}-rank{rank}",
                ChannelAddress(directory, rank),
                run_rank,
                WorkerSpec(config=config, role=role, group_port=group_port),
            )
            for rank in range(config.data_parallel_size)
        ]
        try:
            for engine in engines:
                engine.start()
            await asyncio.gather(*(engine.wait_ready(config.ready_timeout_s) for engine in engines))
            yield engines
        finally:
            await asyncio.gather(*(engine.stop(config.transfer.stop_grace_s + 5.0) for engine in engines))


async def serve(config: NodeConfig, role: Role, stopping: asyncio.Event) -> None:
    """Run the node until `stopping`. Raises ProcessDied when an engine rank ended by itself."""
    model_config = ModelConfig.load(Path(config.engine.model))
    tokenizer = Tokenizer.load(Path(config.engine.model))
    async with engine_processes(config, role) as engines:
        ready = [engine.about for engine in engines]
        model_id = config.model_id
        info = EngineInfo(
            model_id=model_id,
            max_model_len=min(about.max_model_len for about in ready),
            vocab_size=model_config.vocab_size,
            role=role,
            num_ranks=len(engines),
            node_id=config.id,
            block_size=config.engine.block_size,
            checkpoint=str(config.engine.model),
        )
        registry = CollectorRegistry()
        metrics = NodeMetrics(registry)
        recompute = config.engine.kv_load_failure_policy == "recompute"
        client = NodeEngineClient(info, engines, metrics.on_handover, recompute=recompute)
        join = describe(
            node_id=config.id,
            role="prefill" if role == "prefill" else "decode",
            http_url=config.http_url,
            model_id=model_id,
            ranks=ready,
            bootstrap_port=config.bootstrap_port or 0,
            local_prefill=role != "prefill",
            version=info.version,
        )
        membership = Membership(config.membership, join, client.ranks, client.release, client.health)
        for engine in engines:
            engine.on_epoch = membership.epoch_changed
        app = build_app(client, tokenizer, config.api, registry)
        add_cluster_routes(app, membership, client)
        bootstrap: web.AppRunner | None = None
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, config.host, config.port, reuse_address=True, backlog=1024)
            try:
                await site.start()
            except OSError as error:
                raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None
            if config.bootstrap_port is not None:
                bootstrap = await serve_table(
                    config.host, config.bootstrap_port, config.id, lambda: [engine.about for engine in engines]
                )
            log.info("serving %s on %s: %d rank(s), max_model_len=%d", model_id, config.http_url, len(engines),
                     info.max_model_len)  # fmt: skip
            async with asyncio.TaskGroup() as group:
                joined = group.create_task(membership.run())
                await _until_stop_or_death(client, engines, stopping)
                membership.drain()
                await _drain(config, client, engines)
                joined.cancel()
        finally:
            if bootstrap is not None:
                await bootstrap.cleanup()
            await runner.cleanup()


async def _until_stop_or_death(
    client: NodeEngineClient, engines: Sequence[EngineProcess], stopping: asyncio.Event
) -> None:
    deaths = {asyncio.create_task(engine.died()): engine for engine in engines}
    stop = asyncio.create_task(stopping.wait())
    try:
        done, _ = await asyncio.wait({stop, *deaths}, return_when=asyncio.FIRST_COMPLETED)
        dead = [(engine, task.result()) for task, engine in deaths.items() if task in done]
        for engine, reason in dead:
            client.fail_all(engine, reason)
        if dead:
            raise ProcessDied("; ".join(reason for _, reason in dead))
    finally:
        for task in (stop, *deaths):
            task.cancel()


async def _drain(config: NodeConfig, client: NodeEngineClient, engines: Sequence[EngineProcess]) -> None:
    log.info("draining: %d request(s) open, up to %g s", client.num_open, config.drain_timeout_s)
    await asyncio.gather(*(engine.drain(config.drain_timeout_s) for engine in engines))
