"""The node process: it owns the engine processes, the HTTP port and the membership in the cluster.

Start: spawn one engine process per rank, wait until all can take work, open the HTTP port, join the routers. The node
process is API process 0 of the node; `api_processes` may add others on the same port.
End: on SIGTERM the node drains (no new work, running streams finish, promised state is fetched); when an engine or API
process dies the node fails its requests and exits, because the ranks step together and none can go on alone.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal

from api.backend import EngineInfo
from api.tokenizer import Tokenizer
from model.config import ModelConfig
from node.api_process import ApiProcess, api_processes
from node.bootstrap import serve_table
from node.cluster_routes import add_cluster_routes
from node.config import NodeConfig
from node.engine_client import NodeEngineClient
from node.engine_process import EngineProcess
from node.expert_load import total_expert_tokens, watch_experts
from node.http_surface import HttpSurface, SurfaceSpec, check_port_is_free
from node.membership import Membership, describe
from node.worker import WorkerSpec, run_rank
from runtime.channel import ChannelAddress
from runtime.errors import ProcessDied
from runtime.scratch import scratch_directory

log = logging.getLogger(__name__)

Role = Literal["prefill", "decode", "standalone"]


@contextlib.asynccontextmanager
async def engine_processes(config: NodeConfig, role: Role, directory: str) -> AsyncIterator[list[EngineProcess]]:
    """All ranks, ready to take work; stopped on the way out."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        group_port = probe.getsockname()[1]
    engines = [
        EngineProcess(
            f"{role}-rank{rank}",
            ChannelAddress(directory, rank, config.api_processes),
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
    """Run the node until `stopping`. Raises ProcessDied when an engine or API process ended by itself."""
    # Weights take minutes to load, and processes that share a port would not notice a stranger on it.
    check_port_is_free(config.host, config.port)
    vocab_size = ModelConfig.load(Path(config.engine.model)).vocab_size
    tokenizer = Tokenizer.load(Path(config.engine.model))
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(scratch_directory())
        engines = await stack.enter_async_context(engine_processes(config, role, directory))
        spec = SurfaceSpec(config=config, info=_info(config, role, engines, vocab_size), directory=directory)
        surface = HttpSurface(spec, engines, tokenizer)
        membership = _membership(config, role, engines, surface.client)
        add_cluster_routes(
            surface.app,
            membership,
            surface.client,
            lambda: total_expert_tokens(engine.expert_load for engine in engines),
        )
        watch_experts(config, surface.registry, engines)
        for engine in engines:
            engine.on_group_drains = stopping.set
        processes = await stack.enter_async_context(api_processes(spec, config.ready_timeout_s))
        stack.push_async_callback(surface.close)
        await surface.prepare()
        await surface.open()
        for process in processes:
            process.open()
        if config.bootstrap_port is not None:
            table = await serve_table(
                config.host, config.bootstrap_port, config.id, lambda: [engine.about for engine in engines]
            )
            stack.push_async_callback(table.cleanup)
        log.info("serving %s on %s: %d rank(s), max_model_len=%d", spec.info.model_id, config.http_url, len(engines),
                 spec.info.max_model_len)  # fmt: skip
        try:
            async with asyncio.TaskGroup() as group:
                joined = group.create_task(membership.run())
                await _until_stop_or_death(engines, processes, stopping)
                membership.drain()
                await _drain(config, surface.client, engines)
                await asyncio.gather(*(process.finish() for process in processes))
                joined.cancel()
        except ExceptionGroup as errors:
            # What came first is the reason; it cancelled the rest.
            raise errors.exceptions[0] from None


def _info(config: NodeConfig, role: Role, engines: Sequence[EngineProcess], vocab_size: int) -> EngineInfo:
    return EngineInfo(
        model_id=config.model_id,
        max_model_len=min(engine.about.max_model_len for engine in engines),
        vocab_size=vocab_size,
        role=role,
        num_ranks=len(engines),
        node_id=config.id,
        block_size=config.engine.block_size,
        checkpoint=str(config.engine.model),
    )


def _membership(
    config: NodeConfig, role: Role, engines: Sequence[EngineProcess], client: NodeEngineClient
) -> Membership:
    join = describe(
        node_id=config.id,
        role="prefill" if role == "prefill" else "decode",
        http_url=config.http_url,
        model_id=config.model_id,
        ranks=[engine.about for engine in engines],
        bootstrap_port=config.bootstrap_port or 0,
        local_prefill=role != "prefill",
        version=client.info.version,
    )
    membership = Membership(config.membership, join, client.ranks, client.release, client.health)
    for engine in engines:
        engine.on_epoch = membership.epoch_changed
    return membership


async def _until_stop_or_death(
    engines: Sequence[EngineProcess], processes: Sequence[ApiProcess], stopping: asyncio.Event
) -> None:
    children: list[EngineProcess | ApiProcess] = [*engines, *processes]
    deaths = {asyncio.create_task(child.died()): child for child in children}
    stop = asyncio.create_task(stopping.wait())
    try:
        done, _ = await asyncio.wait({stop, *deaths}, return_when=asyncio.FIRST_COMPLETED)
        dead = [(child, task.result()) for task, child in deaths.items() if task in done]
        for child, reason in dead:
            if isinstance(child, EngineProcess):
                child.lose(reason)
        if dead:
            raise ProcessDied("; ".join(reason for _, reason in dead))
    finally:
        for task in (stop, *deaths):
            task.cancel()


async def _drain(config: NodeConfig, client: NodeEngineClient, engines: Sequence[EngineProcess]) -> None:
    log.info("draining: %d request(s) open, up to %g s", client.num_open, config.drain_timeout_s)
    await asyncio.gather(*(engine.drain(config.drain_timeout_s) for engine in engines))
