"""What a cluster is doing: nodes, ranks, load, pages, epochs, health.

    python -m tools.status --url http://127.0.0.1:30000 [--watch] [--json]
    python -m tools.status --node http://127.0.0.1:8001

`--url` asks a router and then every node it knows; `--node` asks nodes directly, as for one that serves alone. Exits 0
when everything asked is healthy, 1 when something is not, 2 when nobody answered.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from typing import TypeVar

import aiohttp
import msgspec

from runtime.requests import EngineStats

T = TypeVar("T")

_CLEAR = "\x1b[2J\x1b[H"


class RankStatus(msgspec.Struct, kw_only=True):
    """One rank: what the router says about it, what it says about itself."""

    rank: int
    epoch: str = ""
    handoff_address: str = ""
    in_flight: int = 0
    """Legs this router has under way on it."""
    stats: EngineStats | None = None
    """None where the node did not answer."""


class NodeStatus(msgspec.Struct, kw_only=True):
    """One node."""

    id: str
    url: str
    role: str
    model: str = ""
    dialect: str = "tandem"
    state: str = "unknown"
    trouble: str = ""
    heard_s_ago: float | None = None
    ranks: list[RankStatus] = []


class Status(msgspec.Struct, kw_only=True):
    """Everything that one look gathered."""

    url: str = ""
    """The router; empty when only nodes were asked."""
    healthy: bool = False
    reason: str | None = None
    pairs: int = 0
    """Pairs of ranks that could serve."""
    proven: int = 0
    """Pairs that did, within the proof age."""
    proven_alone: int = 0
    """Decode ranks that served without a prefill rank, within the proof age."""
    proof_age_s: float | None = None
    nodes: list[NodeStatus] = []
    unreachable: list[str] = []
    """What did not answer, with the reason."""


class _Proof(msgspec.Struct):
    age_s: float
    prefill: str | None = None
    """None: the decode rank computed the prompt itself."""


class _Health(msgspec.Struct):
    status: str
    reason: str | None = None
    pairs: int = 0
    proof_age_s: float = 0.0
    proven: list[_Proof] = []


class _WorkerRank(msgspec.Struct):
    rank: int = 0
    epoch: str = ""
    handoff_address: str = ""
    in_flight: int = 0


class _Worker(msgspec.Struct):
    id: str
    url: str
    worker_type: str
    dialect: str = "tandem"
    model_id: str = ""
    state: str = "unknown"
    trouble: str = ""
    heard_s_ago: float | None = None
    ranks: list[_WorkerRank] = []


class _Workers(msgspec.Struct):
    workers: list[_Worker]


class _Join(msgspec.Struct):
    """GET /cluster/node. Fields of value zero are left out."""

    node_id: str
    role: str = ""
    model_id: str = ""
    ranks: list[_WorkerRank] = []
    local_prefill: bool = False


class Asker:
    """GET with one deadline and typed answers."""

    def __init__(self, session: aiohttp.ClientSession, status: Status) -> None:
        self._session = session
        self._status = status

    async def get(self, url: str, kind: type[T]) -> T | None:
        """The answer, whatever its HTTP status, or None with the reason noted."""
        try:
            async with self._session.get(url) as response:
                return msgspec.json.decode(await response.read(), type=kind)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._status.unreachable.append(f"{url}: {type(error).__name__}: {error}".removesuffix(": "))
            return None

    async def ranks_of(self, node: NodeStatus) -> None:
        """Fill in what the node's ranks say about themselves."""
        stats = {s.rank: s for s in await self.get(f"{node.url}/cluster/ranks", list[EngineStats]) or ()}
        for rank in node.ranks:
            rank.stats = stats.get(rank.rank)


async def look(router: str | None, nodes: Sequence[str], timeout_s: float = 5.0) -> Status:
    """Ask the router, the nodes it knows, and `nodes`. Whatever does not answer is listed, nothing is raised."""
    status = Status(url=router or "", healthy=True)
    headers = {"authorization": f"Bearer {key}"} if (key := os.environ.get("OPENAI_API_KEY")) else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
        asker = Asker(session, status)
        if router is not None:
            await _look_at_router(asker, router, status)
        joins = await asyncio.gather(*(asker.get(f"{url}/cluster/node", _Join) for url in nodes))
        # A node may announce an address that only its cluster can reach: the one that was asked is known to work.
        status.nodes += [_from_join(join, url) for join, url in zip(joins, nodes, strict=True) if join is not None]
        await asyncio.gather(*(asker.ranks_of(node) for node in status.nodes if node.dialect == "tandem"))
        if router is None:
            await _look_at_nodes(session, status)
    status.healthy &= not status.unreachable and bool(status.nodes)
    return status


async def _look_at_router(asker: Asker, url: str, status: Status) -> None:
    health, workers = await asyncio.gather(asker.get(f"{url}/health", _Health), asker.get(f"{url}/workers", _Workers))
    status.healthy = health is not None and health.status == "healthy"
    if health is not None:
        ages = [proof.age_s for proof in health.proven]
        status.reason, status.pairs = health.reason, health.pairs
        fresh = [proof for proof in health.proven if proof.age_s <= health.proof_age_s]
        status.proven = sum(proof.prefill is not None for proof in fresh)
        status.proven_alone = len(fresh) - status.proven
        status.proof_age_s = min(ages, default=None)
    for worker in workers.workers if workers is not None else ():
        status.nodes.append(
            NodeStatus(
                id=worker.id,
                url=worker.url,
                role=worker.worker_type,
                dialect=worker.dialect,
                model=worker.model_id,
                state=worker.state,
                trouble=worker.trouble,
                heard_s_ago=worker.heard_s_ago,
                ranks=_ranks(worker.ranks),
            )
        )


async def _look_at_nodes(session: aiohttp.ClientSession, status: Status) -> None:
    """Without a router a node's own /health decides."""
    for node in status.nodes:
        try:
            async with session.get(f"{node.url}/health") as response:
                node.state = "ready" if response.status == 200 else "troubled"
                node.trouble = "" if response.status == 200 else (await response.text()).strip()[:200]
        except (aiohttp.ClientError, TimeoutError) as error:
            node.state, node.trouble = "troubled", f"{type(error).__name__}: {error}".removesuffix(": ")
        status.healthy &= node.state == "ready"


def _from_join(join: _Join, url: str) -> NodeStatus:
    role = "standalone" if join.local_prefill else join.role.lower()
    return NodeStatus(id=join.node_id, url=url, role=role, model=join.model_id, ranks=_ranks(join.ranks))


def _ranks(ranks: Sequence[_WorkerRank]) -> list[RankStatus]:
    return [
        RankStatus(rank=r.rank, epoch=r.epoch, handoff_address=r.handoff_address, in_flight=r.in_flight) for r in ranks
    ]


def table(status: Status) -> str:
    """For people."""
    lines = []
    if status.url:
        word = "healthy" if status.healthy else "NOT HEALTHY"
        proof = "never" if status.proof_age_s is None else f"{status.proof_age_s:.1f} s ago"
        reason = f" ({status.reason})" if status.reason else ""
        alone = f" and {status.proven_alone} without prefill" if status.proven_alone else ""
        lines.append(
            f"router {status.url}: {word}{reason}; {status.proven} of {status.pairs} pairs proven{alone}, last {proof}"
        )
    rows = [_HEAD, *(row for node in status.nodes for row in _rows(node))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:_LEFT], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[_LEFT:], widths[_LEFT:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines += [f"trouble: {node.id}: {node.trouble}" for node in status.nodes if node.trouble]
    lines += [f"no answer: {reason}" for reason in status.unreachable]
    return "\n".join(lines)


_LEFT = 5
"""Columns of text; the rest are numbers."""
_HEAD = (
    "node", "role", "state", "rank", "epoch", "heard", "legs", "run", "wait", "recv", "held", "queued", "pages free",
    "quar", "slots free", "in", "out", "failed", "redone", "preempt",
)  # fmt: skip


def _rows(node: NodeStatus) -> list[tuple[str, ...]]:
    heard = "-" if node.heard_s_ago is None else f"{node.heard_s_ago:.1f}s"
    rows = []
    for index, rank in enumerate(node.ranks):
        first = (node.id, node.role, node.state) if index == 0 else ("", "", "")
        s = rank.stats
        numbers: tuple[str, ...] = ("-",) * 13
        if s is not None:
            numbers = (
                *map(str, (s.running, s.waiting, s.receiving, s.held, s.queued_prompt_tokens)),
                f"{s.pages_free}/{s.pages_total}",
                str(s.pages_quarantined),
                f"{s.slots_free}/{s.slots_total}",
                *map(str, (s.transfers_received, s.transfers_sent, s.transfers_failed, s.recomputed, s.preemptions)),
            )
        rows.append(
            (*first, str(rank.rank), rank.epoch[:8], heard if index == 0 else "", str(rank.in_flight), *numbers)
        )
    return rows or [(node.id, node.role, node.state, *("-",) * (len(_HEAD) - 3))]


async def watch(router: str | None, nodes: Sequence[str], every_s: float, *, as_json: bool) -> None:
    """Look again and again until interrupted."""
    while True:
        began = time.monotonic()
        status = await look(router, nodes)
        head = "" if as_json else f"{_CLEAR}{time.strftime('%H:%M:%S')}\n"
        print(head + _shown(status, as_json=as_json), flush=True)
        await asyncio.sleep(max(0.0, every_s - (time.monotonic() - began)))


def _shown(status: Status, *, as_json: bool) -> str:
    return msgspec.json.encode(status).decode() if as_json else table(status)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.status", description="Show what a cluster is doing.")
    parser.add_argument("--url", help="a router (default without --node: http://127.0.0.1:30000)")
    parser.add_argument(
        "--node", action="append", default=[], metavar="URL", help="a node, asked directly (repeatable)"
    )
    parser.add_argument("--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help="again and again; 2")
    parser.add_argument("--json", action="store_true", help="one line of JSON a look")
    options = parser.parse_args(arguments)
    router = options.url or (None if options.node else "http://127.0.0.1:30000")
    router = router.rstrip("/") if router else None
    nodes = [url.rstrip("/") for url in options.node]
    if options.watch is not None:
        try:
            asyncio.run(watch(router, nodes, options.watch, as_json=options.json))
        except KeyboardInterrupt:
            sys.exit(0)
    status = asyncio.run(look(router, nodes))
    print(_shown(status, as_json=options.json))
    sys.exit(0 if status.healthy else 1 if status.nodes else 2)


if __name__ == "__main__":
    main()
