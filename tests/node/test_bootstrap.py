"""The table that vLLM's routers ask for, and what a decode node makes of it."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from node.bootstrap import Resolver, serve_table
from runtime.errors import ConfigError, TransferError
from runtime.requests import EngineReady
from tests.cluster.harness import free_port


def ready(rank: int, port: int, epoch: str = "e") -> EngineReady:
    return EngineReady(
        rank=rank,
        epoch=epoch,
        handoff_address=f"127.0.0.1:{port}",
        format_digest="d",
        format_summary="s",
        max_model_len=1,
        num_pages=1,
        num_slots=1,
    )


@pytest.fixture
async def table() -> AsyncIterator[tuple[str, list[EngineReady]]]:
    port = free_port()
    ranks = [ready(0, 4000, "a" * 32), ready(1, 4001, "b" * 32)]
    runner = await serve_table("127.0.0.1", port, "node-a", lambda: ranks)
    yield f"http://127.0.0.1:{port}", ranks
    await runner.cleanup()


async def test_the_table_has_the_shape_vllm_gives_it(table: tuple[str, list[EngineReady]]) -> None:
    url, _ = table
    async with aiohttp.ClientSession() as session, session.get(f"{url}/query") as response:
        assert response.status == 200
        body = await response.json()
    assert {key: (entry["engine_id"], entry["worker_addr"]) for key, entry in body.items()} == {
        "0": ("node-a_dp0", {"0": {"0": "tcp://127.0.0.1:4000"}}),
        "1": ("node-a_dp1", {"0": {"0": "tcp://127.0.0.1:4001"}}),
    }


async def test_an_engine_is_found_and_found_again_after_a_restart(
    table: tuple[str, list[EngineReady]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, ranks = table
    resolver = Resolver()
    assert await resolver.resolve(url, "node-a_dp1") == ("127.0.0.1:4001", "b" * 32)
    ranks[1] = ready(1, 5001, "c" * 32)
    monkeypatch.setattr("node.bootstrap._TABLE_AGE_S", 0.0)
    assert await resolver.resolve(url, "node-a_dp1") == ("127.0.0.1:5001", "c" * 32)


async def test_an_engine_that_is_not_there_is_told_by_name(table: tuple[str, list[EngineReady]]) -> None:
    url, _ = table
    with pytest.raises(TransferError, match=r"no engine 'node-b_dp0', only node-a_dp0, node-a_dp1"):
        await Resolver().resolve(url, "node-b_dp0")


async def test_a_bootstrap_port_where_nobody_listens_is_told() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TransferError, match=url):
        await Resolver(timeout_s=2).resolve(url, "x")


async def test_a_bootstrap_port_in_use_is_told(table: tuple[str, list[EngineReady]]) -> None:
    port = int(table[0].rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"bootstrap_port 127.0.0.1:{port}"):
        await serve_table("127.0.0.1", port, "node-b", list)
