"""A node's membership against a real router's cluster service."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from node.membership import Membership, MembershipConfig, as_json, describe
from router.cluster_service import start_cluster_server
from router.config import ClusterConfig
from router.nodes import Role
from router.registry import Registry, Release
from runtime.config import convert
from runtime.errors import ConfigError
from runtime.grpc import TlsConfig
from runtime.requests import EngineReady, EngineStats, EpochChanged

HERE = Path(__file__).parent / "certificates"


def ready(rank: int = 0, digest: str = "d1") -> EngineReady:
    return EngineReady(
        rank=rank,
        epoch=f"{rank:032x}",
        handoff_address=f"127.0.0.1:{9000 + rank}",
        format_digest=digest,
        format_summary=f"format {digest}",
        max_model_len=4096,
        num_pages=10,
        num_slots=4,
    )


def stats(rank: int = 0, **changes: int) -> EngineStats:
    values = dict.fromkeys(EngineStats.__struct_fields__, 0) | {"draining": False, "rank": rank} | changes
    return EngineStats(**values)


def make(address: str, node_id: str = "n1", role: str = "decode", digest: str = "d1", model: str = "m", **options):
    join = describe(
        node_id=node_id,
        role=role,  # type: ignore[arg-type]
        http_url="http://127.0.0.1:1",
        model_id=model,
        ranks=[ready(0, digest), ready(1, digest)],
    )
    config = MembershipConfig(routers=(address,), first_retry_s=0.02, max_retry_s=0.1, **options.pop("config", {}))
    arguments = {"stats": lambda: [stats(0), stats(1)], "on_release": lambda transfer_id: None, **options}
    return Membership(config, join, **arguments)


@contextlib.asynccontextmanager
async def router(config: ClusterConfig | None = None, registry: Registry | None = None) -> AsyncIterator:
    registry = registry or Registry()
    config = config or ClusterConfig(port=0, heartbeat_s=0.05, missed_heartbeats=6)
    server, port = await start_cluster_server(config, registry, "r1", asyncio.get_running_loop().time)
    try:
        yield registry, f"127.0.0.1:{port}", server
    finally:
        await server.stop(grace=0)


@contextlib.asynccontextmanager
async def running(*memberships: Membership) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(membership.run()) for membership in memberships]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


async def test_a_node_joins_with_all_it_is_and_leaves_at_once():
    async with router() as (registry, address, _):
        async with running(make(address)):
            await until(lambda: registry.get("n1"))
            info = registry.get("n1").info
            assert (info.role, info.model_id, info.max_model_len) == (Role.DECODE, "m", 4096)
            assert [rank.handoff_address for rank in info.ranks] == ["127.0.0.1:9000", "127.0.0.1:9001"]
        await until(lambda: registry.get("n1") is None, 1.0)


async def test_heartbeats_carry_load_and_trouble():
    trouble = [None]
    load = [3]
    async with router() as (registry, address, _):
        node = make(address, stats=lambda: [stats(1, pages_free=load[0])], health=lambda: trouble[0])
        async with running(node):
            await until(lambda: registry.get("n1") and registry.get("n1").targets[1].load.pages_free == 3)
            load[0], trouble[0] = 9, "the disk is full"
            await until(lambda: registry.get("n1").trouble == "the disk is full")
            assert registry.get("n1").targets[1].load.pages_free == 9
            assert registry.targets(Role.DECODE) == ()
            trouble[0] = None
            await until(lambda: len(registry.targets(Role.DECODE)) == 2)


async def test_releases_reach_the_node_in_order():
    released: list[str] = []
    async with router() as (registry, address, _), running(make(address, on_release=released.append)):
        await until(lambda: registry.get("n1"))
        ids = [f"t{number}" for number in range(3000)]
        for transfer_id in ids:
            registry.release(registry.get("n1"), Release(transfer_id, registry.get("n1").info.ranks[0], computed=True))
        await until(lambda: len(released) == len(ids))
        assert released == ids


async def test_a_new_epoch_and_draining_are_told_at_once_and_remembered():
    config = ClusterConfig(port=0, heartbeat_s=30.0)
    async with router(config) as (registry, address, server):
        node = make(address)
        async with running(node):
            await until(lambda: node.attached)
            node.epoch_changed(EpochChanged(rank=1, epoch="e" * 32, handoff_address="127.0.0.1:7"))
            node.drain()
            await until(lambda: registry.get("n1").targets[1].info.epoch == "e" * 32)
            await until(lambda: registry.get("n1").draining)
            # Another router comes up under the same address: it hears both from the start.
            await server.stop(grace=0)
            other = Registry()
            again, _ = await start_cluster_server(
                ClusterConfig(port=int(address.rpartition(":")[2])), other, "r2", asyncio.get_running_loop().time
            )
            await until(lambda: other.get("n1") and other.get("n1").draining)
            assert other.get("n1").targets[1].info.epoch == "e" * 32
            await again.stop(grace=0)


async def test_an_epoch_of_an_unknown_rank_is_a_bug_said_loudly():
    with pytest.raises(ValueError, match="rank 5"):
        make("127.0.0.1:1").epoch_changed(EpochChanged(rank=5, epoch="e" * 32, handoff_address=""))


async def test_a_node_waits_for_a_router_that_is_not_there_yet():
    async with router() as (registry, address, server):
        await server.stop(grace=0)
        node = make(address)
        async with running(node):
            await asyncio.sleep(0.2)
            assert not node.attached
            again, _ = await start_cluster_server(
                ClusterConfig(port=int(address.rpartition(":")[2])), registry, "r2", asyncio.get_running_loop().time
            )
            await until(lambda: node.attached)
            await again.stop(grace=0)


async def test_several_routers_are_joined_separately():
    async with router() as (first, one, _), router() as (second, two, _):
        join = make(one).join
        config = MembershipConfig(routers=(one, two))
        node = Membership(config, join, list, lambda transfer_id: None)
        async with running(node):
            await until(lambda: sorted(node.attached) == sorted([one, two]))
            assert first.get("n1")
            assert second.get("n1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"digest": "d2"}, ["format d1", "format d2"]), ({"model": "other"}, ["'m'", "'other'"])],
)
async def test_a_node_that_does_not_fit_is_refused_by_name_and_fits_later(changes, words, caplog):
    async with router() as (registry, address, _):
        async with running(make(address, "n1")):
            await until(lambda: registry.get("n1"))
            stranger = asyncio.create_task(make(address, "n2", **changes).run())
            await until(lambda: all(word in caplog.text for word in words))
            assert registry.get("n2") is None
        await until(lambda: registry.get("n2"))
        stranger.cancel()
        await asyncio.gather(stranger, return_exceptions=True)


async def test_a_node_that_falls_silent_is_lost():
    async with router() as (registry, address, _):
        # A stream by hand that joins and then says nothing.
        from proto import cluster_pb2 as pb
        from proto import cluster_pb2_grpc

        async with grpc.aio.insecure_channel(address) as channel:
            call = cluster_pb2_grpc.ClusterStub(channel).Attach()
            await call.write(pb.NodeMessage(join=make(address).join))
            await until(lambda: registry.get("n1"))
            await until(lambda: registry.get("n1") is None, 2.0)


async def test_streams_that_do_not_begin_with_a_join_are_refused():
    from proto import cluster_pb2 as pb
    from proto import cluster_pb2_grpc

    async with router() as (registry, address, _), grpc.aio.insecure_channel(address) as channel:
        bad = [
            pb.NodeMessage(heartbeat=pb.Heartbeat()),
            pb.NodeMessage(join=pb.Join(node_id="x")),
            pb.NodeMessage(join=pb.Join(node_id="x", role=pb.DECODE, http_url="ftp://x")),
            pb.NodeMessage(join=pb.Join(node_id="x", role=pb.DECODE, http_url="http://x:1")),
            pb.NodeMessage(
                join=pb.Join(node_id="x", role=pb.PREFILL, http_url="http://x:1", ranks=[pb.Rank(rank=0, epoch="e")])
            ),
        ]
        for message in bad:
            call = cluster_pb2_grpc.ClusterStub(channel).Attach()
            await call.write(message)
            answer = await call.read()
            assert answer.refused.reason
        assert not list(registry.nodes)


async def test_what_a_node_says_over_http_is_what_it_joins_with():
    body = as_json(make("127.0.0.1:1").join)
    assert body["role"] == "DECODE"
    assert body["ranks"][1] == {"rank": 1, "epoch": f"{1:032x}", "handoff_address": "127.0.0.1:9001"}


@pytest.mark.parametrize("bad", ["here", ":1", "host:", "host:port"])
def test_a_router_address_without_host_or_port_is_refused(bad):
    with pytest.raises(ConfigError, match="host:port"):
        convert({"routers": [bad]}, MembershipConfig, where="test")


async def test_mutual_tls_lets_in_only_whom_the_authority_signed():
    good, other = (
        TlsConfig(cert=str(HERE / f"{who}.pem"), key=str(HERE / f"{who}.key"), ca=str(HERE / f"{who}-ca.pem"))
        for who in ("good", "other")
    )
    config = ClusterConfig(port=0, heartbeat_s=0.05, tls=good)
    async with router(config) as (registry, address, _):
        stranger = make(address, "n2", config={"tls": other, "connect_s": 0.5})
        member = make(address, "n1", config={"tls": good})
        async with running(stranger, member):
            await until(lambda: registry.get("n1"))
            await asyncio.sleep(0.3)
            assert registry.get("n2") is None
