"""The status command against a real router and real members of its cluster."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from aiohttp import web

from node.cluster_routes import add_cluster_routes
from node.engine_client import NodeEngineClient
from node.membership import Membership, MembershipConfig, describe
from runtime.requests import EngineReady, EngineStats
from tests.router.harness import Cluster, cluster, settings
from tools.status import Status, look, table

ROOT = Path(__file__).resolve().parents[2]
EPOCH = "0123456789abcdef" * 2


class Engines:
    """The engine side of a node: what its ranks report, and whether they are well."""

    def __init__(self, ranks: int) -> None:
        self.stats = [EngineStats(rank=rank, pages_total=100, pages_free=90 - rank) for rank in range(ranks)]
        self.trouble: str | None = None

    def ranks(self) -> Sequence[EngineStats]:
        return self.stats

    def health(self) -> str | None:
        return self.trouble

    def release(self, transfer_id: str) -> None:
        raise AssertionError(f"nothing was handed over, but {transfer_id} is released")


@contextlib.asynccontextmanager
async def node(
    role: str, engines: Engines, routers: tuple[str, ...] = (), *, alone: bool = False
) -> AsyncIterator[str]:
    """A member of the cluster with its HTTP routes; yields its URL."""
    app = web.Application()
    runner = web.AppRunner(app, access_log=None)
    ready = [
        EngineReady(rank=stats.rank, epoch=EPOCH, handoff_address=f"127.0.0.1:{9000 + stats.rank}", format_digest="f0",
                    format_summary="f", max_model_len=100, num_pages=100, num_slots=4)
        for stats in engines.stats
    ]  # fmt: skip
    join = describe(node_id=f"{role}-0", role=cast(Any, role), http_url="http://127.0.0.1:1", model_id="m",
                    ranks=ready, local_prefill=alone)  # fmt: skip
    membership = Membership(
        MembershipConfig(routers=routers, first_retry_s=0.05), join, engines.ranks, engines.release, engines.health
    )

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=503 if engines.trouble else 200, text=engines.trouble or "")

    app.router.add_get("/health", health)
    add_cluster_routes(app, membership, cast(NodeEngineClient, engines), list)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    membership.join.http_url = url
    running = asyncio.create_task(membership.run())
    try:
        yield url
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await runner.cleanup()


@contextlib.asynccontextmanager
async def small_cluster() -> AsyncIterator[tuple[Cluster, Engines, Engines]]:
    prefill, decode = Engines(2), Engines(1)
    async with cluster(lambda world, routers: [], settings()) as running:
        routers = (f"127.0.0.1:{running.service.cluster_port}",)
        async with node("prefill", prefill, routers), node("decode", decode, routers):
            await running.until(lambda: len(list(running.service.registry.nodes)) == 2)
            yield running, prefill, decode


async def test_a_look_gathers_what_router_and_nodes_say() -> None:
    async with small_cluster() as (running, prefill, _):
        prefill.stats[1] = msgspec.structs.replace(prefill.stats[1], held=3, pages_quarantined=7, transfers_failed=2)
        status = await look(running.url, [])
        assert not status.healthy
        assert status.reason == "no pair was proven recently"
        assert (status.pairs, status.proven, status.unreachable) == (2, 0, [])
        by_role = {n.role: n for n in status.nodes}
        assert set(by_role) == {"prefill", "decode"}
        assert [rank.rank for rank in by_role["prefill"].ranks] == [0, 1]
        second = by_role["prefill"].ranks[1]
        assert (second.epoch, second.handoff_address) == (EPOCH, "127.0.0.1:9001")
        assert second.stats == prefill.stats[1]
        text = table(status)
        assert "NOT HEALTHY (no pair was proven recently); 0 of 2 pairs proven, last never" in text
        rows = [line.split() for line in text.splitlines()[1:]]
        assert rows[0][:5] == ["node", "role", "state", "rank", "epoch"]
        row = next(row for row in rows if row[0] == "1")
        assert row == ["1", EPOCH[:8], "0", "0", "0", "0", "3", "0", "89/100", "7", "0/0", "0", "0", "2", "0", "0"]


async def test_a_proven_pair_makes_the_cluster_healthy_and_trouble_is_shown() -> None:
    async with small_cluster() as (running, _, decode):
        registry = running.service.registry
        roles = {n.info.role.value: n for n in registry.nodes}
        running.service.proofs.record(roles["prefill"].targets[0], roles["decode"].targets[0], running.service.clock())
        status = await look(running.url, [])
        assert status.healthy
        assert (status.proven, status.pairs) == (1, 2)
        assert status.proof_age_s is not None
        assert status.proof_age_s < 5
        running.service.proofs.record(None, roles["decode"].targets[0], running.service.clock())
        status = await look(running.url, [])
        assert (status.proven, status.proven_alone) == (1, 1)
        assert "healthy; 1 of 2 pairs proven and 1 without prefill" in table(status)
        decode.trouble = "engine rank 0 is not running"
        await running.until(lambda: not roles["decode"].usable)
        status = await look(running.url, [])
        assert not status.healthy
        assert "trouble: decode-0: engine rank 0 is not running" in table(status)


async def test_a_node_that_does_not_answer_is_named_and_the_rest_still_shown() -> None:
    async with small_cluster() as (running, _, _):
        for attached in running.service.registry.nodes:
            if attached.info.role.value == "decode":
                object.__setattr__(attached.info, "url", "http://127.0.0.1:1")
        status = await look(running.url, [])
        assert len(status.nodes) == 2
        assert len(status.unreachable) == 1
        assert status.unreachable[0].startswith("http://127.0.0.1:1/cluster/ranks: ClientConnectorError")
        assert "no answer: http://127.0.0.1:1/cluster/ranks" in table(status)
        assert not status.healthy


async def test_a_node_alone_is_asked_directly() -> None:
    engines = Engines(2)
    async with node("decode", engines, alone=True) as url:
        status = await look(None, [url])
        assert status.healthy
        assert [(n.role, n.state, len(n.ranks)) for n in status.nodes] == [("standalone", "ready", 2)]
        assert [rank.rank for rank in status.nodes[0].ranks] == [0, 1]
        engines.trouble = "engine rank 1 is not running"
        status = await look(None, [url])
        assert not status.healthy
        assert status.nodes[0].trouble == "engine rank 1 is not running"


async def test_nobody_there_is_not_healthy() -> None:
    status = await look("http://127.0.0.1:1", ["http://127.0.0.1:2"])
    assert not status.healthy
    assert status.nodes == []
    assert len(status.unreachable) == 3


async def test_the_command_prints_and_answers_with_its_exit_code() -> None:
    engines = Engines(1)
    async with node("decode", engines, alone=True) as url:

        async def run(*arguments: str) -> tuple[int, str]:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tools.status", *arguments, cwd=ROOT, stdout=subprocess.PIPE
            )
            out, _ = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode is not None
            return process.returncode, out.decode()

        code, out = await run("--node", url, "--json")
        assert code == 0
        assert msgspec.json.decode(out, type=Status).nodes[0].url == url
        engines.trouble = "bad"
        code, out = await run("--node", url)
        assert code == 1
        assert "standalone" in out
        assert (await run("--url", "http://127.0.0.1:1"))[0] == 2
