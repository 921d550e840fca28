"""Living behind a router that speaks vLLM's Mooncake protocol: the table it asks prefill nodes for, and its reading.

Such a router asks each prefill node once for `GET /query` on the bootstrap port and later tells the decode node only
that address and the name of one engine. So the table of a prefill node names, for every rank, where its hand-off
service listens, and the decode node looks the engine up there. A table is complete or an error: from a partial one the
router would take another rank's engine. Names do not change over restarts, because the router never asks again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp import web

from runtime.errors import ConfigError, TransferError
from runtime.requests import EngineReady

log = logging.getLogger(__name__)

_TABLE_AGE_S = 2.0
"""How long a table is believed. A prefill node that restarted is seen after this, without anybody telling."""


class TableEntry(msgspec.Struct, frozen=True):
    """One rank. `worker_addr` is tensor-parallel rank -> pipeline rank -> address; `epoch` is ours, others skip it."""

    engine_id: str
    worker_addr: dict[str, dict[str, str]]
    epoch: str = ""


_decode_table = msgspec.json.Decoder(dict[str, TableEntry]).decode


def engine_id(node_id: str, rank: int, num_ranks: int) -> str:
    """The name of a rank, the same after every restart."""
    return node_id if num_ranks == 1 else f"{node_id}_dp{rank}"


def table(node_id: str, ranks: Sequence[EngineReady]) -> dict[str, TableEntry]:
    """What `GET /query` answers."""
    return {
        str(about.rank): TableEntry(
            engine_id=engine_id(node_id, about.rank, len(ranks)),
            worker_addr={"0": {"0": f"tcp://{about.handoff_address}"}},
            epoch=about.epoch,
        )
        for about in ranks
    }


async def serve_table(host: str, port: int, node_id: str, ranks: Callable[[], Sequence[EngineReady]]) -> web.AppRunner:
    """Open the bootstrap port. The caller cleans the runner up. Raises ConfigError when the port is taken."""

    async def query(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(table(node_id, ranks())), content_type="application/json")

    app = web.Application()
    app.router.add_get("/query", query)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, reuse_address=True).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on bootstrap_port {host}:{port}: {error.strerror}") from None
    return runner


class Resolver:
    """Finds the hand-off service behind (bootstrap address, engine id). Owned by the API process of a decode node."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self._timeout_s = timeout_s
        self._tables: dict[str, tuple[float, dict[str, TableEntry]]] = {}
        self._asking: dict[str, asyncio.Lock] = {}

    async def resolve(self, bootstrap_address: str, wanted: str) -> tuple[str, str]:
        """-> (host:port of the hand-off service, epoch). Raises TransferError when there is no such engine now."""
        async with self._asking.setdefault(bootstrap_address, asyncio.Lock()):
            read_at, entries = self._tables.get(bootstrap_address, (float("-inf"), {}))
            if time.monotonic() - read_at > _TABLE_AGE_S:
                entries = await self._read(bootstrap_address)
                self._tables[bootstrap_address] = (time.monotonic(), entries)
        for entry in entries.values():
            if entry.engine_id == wanted:
                address = entry.worker_addr["0"]["0"]
                return urlsplit(address).netloc, entry.epoch
        known = ", ".join(entry.engine_id for entry in entries.values())
        raise TransferError(f"{bootstrap_address} knows no engine {wanted!r}, only {known or 'none'}")

    async def _read(self, bootstrap_address: str) -> dict[str, TableEntry]:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"{bootstrap_address.rstrip('/')}/query") as response,
            ):
                response.raise_for_status()
                return _decode_table(await response.read())
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise TransferError(f"bootstrap table of {bootstrap_address}: {error or type(error).__name__}") from None
