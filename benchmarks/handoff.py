"""What a hand-off costs: states of DeepSeek-V4-Flash's sizes from one process to another over Mooncake.

    python -m benchmarks.handoff [--rounds 15] [--tokens 1024 8192 65536] [--set max_read_bytes=1048576 ...]
    python -m benchmarks.handoff --device cuda --set transport=intra_node      # pools of both on one GPU
    python -m benchmarks.handoff --device cuda --busy 25        # while the decode side's GPU runs steps of 25 ms
    python -m benchmarks.handoff --device cuda:0 --from cuda:1 --set transport=intra_node              # or on two
    python -m benchmarks.handoff --apart                        # each side on half of the cores, as on two hosts

The claim waits for the prompt, as in service. "total" runs from the call that says that the prompt is done, in the
prefill process, to the event that gives pages and slot to the decode process's engine: messages, reads, lease checks
and all. "reads" is the part from the first read to the last, the rest is messages and wake-ups.

The transfer engine alone reads the same number of bytes as one contiguous buffer, by the best of three ways (one
blocking call; one read, polled; cut into pieces that all connections share), alternating with the hand-offs in the same
run on the same machine. Ratios of rates are medians over the rounds, so that a machine that is slower for a while is
slower for both; the best way is that of the even rounds, the ratios are those of the odd ones, so that luck in choosing
does not count. "in order" pages are neighbours on both sides, "scattered" ones lie in random order, and those "in use"
are what an engine's pools hand out when states of all lengths have come and gone for long. Figures are medians. Within
a node one buffer is one copy, which says nothing about pages: there the rate of the reads counts.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import msgspec
import torch

from benchmarks.busy_steps import BusySteps
from benchmarks.handoff_sides import Rank, Source, serve
from benchmarks.used_pool import UsedPool
from kv_transfer.agent_events import Received, ReceiveFailed
from kv_transfer.config import TransferConfig
from kv_transfer.mooncake import MooncakeEngine, ReadHandle, ReadState
from kv_transfer.pieces import Piece, split

LIMIT = 0.9
NODE_GBPS, NODE_TOKENS = 120.0, 8192
"""Of the reads within a node, for states that are not small."""
WARM_UP = 6
"""Rounds that open connections and touch memory."""
NAP_S = 0.0003
PROMPT_S = 0.005
"""How long a prompt takes here: the claim has arrived long before its end."""
ORDERS = ("in order", "in use", "scattered")
POOL_STATES = {"cpu": 2, "cuda": 16}
"""States of the largest size that a pool holds."""


def read_blocking(bare: MooncakeEngine, session_id: str, piece: Piece) -> None:
    if bare.raw.transfer_sync_read(session_id, piece.local, piece.remote, piece.num_bytes) != 0:
        raise SystemExit("a blocking read failed")


def read_pieces(bare: MooncakeEngine, session_id: str, pieces: Sequence[Piece], window: int) -> None:
    """Submit within a window, poll the oldest: the engine alone, at its best."""
    many = bare.max_pieces
    waiting = deque(pieces[first : first + many] for first in range(0, len(pieces), many))
    in_flight = deque[ReadHandle]()
    while waiting or in_flight:
        while waiting and len(in_flight) < window:
            in_flight.append(bare.submit(session_id, waiting.popleft()))
        moved = False
        while in_flight and (state := bare.poll(in_flight[0])) is not ReadState.PENDING:
            if state is ReadState.FAILED:
                raise SystemExit("a read failed")
            in_flight.popleft()
            moved = True
        if not moved:
            time.sleep(NAP_S)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Row:
    """Seconds of every round."""

    num_tokens: int
    order: str
    num_bytes: int
    best: str
    totals: list[float]
    reads: list[float]
    bare: list[float]

    def ratio(self, seconds: list[float]) -> float:
        return statistics.median(bare / mine for bare, mine in zip(self.bare, seconds, strict=True))

    @property
    def text(self) -> str:
        total, reads, bare = (statistics.median(seconds) for seconds in (self.totals, self.reads, self.bare))
        return (
            f"{self.num_tokens:>7} {self.order:>9} {self.num_bytes / 1e6:>8.1f} "
            f"{1e3 * total:>8.2f} {1e3 * reads:>8.2f} {self.num_bytes / reads / 1e9:>6.2f} "
            f"{1e3 * bare:>8.2f} {self.num_bytes / bare / 1e9:>6.2f} {self.best:>9} "
            f"{self.ratio(self.reads):>6.2f} {self.ratio(self.totals):>6.2f}"
        )


class Bench:
    def __init__(self, config: TransferConfig, rank: Rank, source: Source) -> None:
        self._config = config
        self._rank = rank
        self._source = source
        self._transfers = 0
        count = rank.pages.count
        self._used = [UsedPool(count, max(1, count // POOL_STATES["cuda"])) for _ in range(2)]

    def hand_off(self, num_tokens: int, order: str) -> tuple[float, Received]:
        """(seconds from the end of the prompt to the event, the event) of one state."""
        rank, facts = self._rank, self._source.facts
        count = rank.format.num_pages(num_tokens)
        match order:
            case "in order":
                first = random.randint(0, rank.pages.count - count)
                theirs = mine = list(range(first, first + count))
            case "in use":
                theirs, mine = (pool.take(count) for pool in self._used)
            case _:
                theirs, mine = (random.sample(range(rank.pages.count), count) for _ in self._used)
        self._transfers += 1
        transfer_id = f"{self._transfers:032x}"
        self._source.tell(transfer_id, num_tokens)
        self._source.line()
        rank.agent.open_receive(transfer_id, facts["address"], facts["epoch"], num_tokens, b"hash", mine, 1)
        time.sleep(PROMPT_S)
        self._source.tell(transfer_id, theirs)
        event = rank.next_event(Received | ReceiveFailed)  # type: ignore[arg-type]
        ended_at = time.monotonic()
        if not isinstance(event, Received):
            raise SystemExit(f"not received: {event}")
        return ended_at - self._source.line(), event

    def bare_ways(self, num_bytes: int) -> dict[str, Callable[[], None]]:
        """Each call reads another part of the pool: caches help the engine alone no more than a hand-off."""
        bare, session_id = self._rank.bare, self._source.facts["session_id"]

        def whole() -> Piece:
            stride, pages = self._rank.pages.stride_bytes, self._rank.pages
            offset = stride * random.randint(0, (pages.num_bytes + self._rank.slots.stride_bytes - num_bytes) // stride)
            return Piece(self._rank.base_address + offset, self._source.facts["base_address"] + offset, num_bytes)

        def parts() -> list[Piece]:
            return list(split([whole()], self._config.read_bytes_limit))

        return {
            "blocking": lambda: read_blocking(bare, session_id, whole()),
            "polled": lambda: read_pieces(bare, session_id, [whole()], 1),
            "in pieces": lambda: read_pieces(bare, session_id, parts(), self._config.window),
        }

    def row(self, num_tokens: int, order: str, rounds: int) -> Row:
        pages = self._rank.format.num_pages(num_tokens)
        num_bytes = pages * self._rank.pages.stride_bytes + self._rank.slots.stride_bytes
        ways = self.bare_ways(num_bytes)
        bare_s: dict[str, list[float]] = {name: [] for name in ways}
        totals, reads = [], []
        for round_number in range(2 * rounds + WARM_UP):
            took, event = self.hand_off(num_tokens, order)
            bare_now = {name: timed(way) for name, way in ways.items()}
            if round_number >= WARM_UP:
                totals.append(took)
                reads.append(event.transfer_s)
                for name, seconds in bare_now.items():
                    bare_s[name].append(seconds)
        best = min(ways, key=lambda name: statistics.median(bare_s[name][::2]))
        return Row(num_tokens, order, num_bytes, best, totals[1::2], reads[1::2], bare_s[best][1::2])


def halves() -> tuple[list[int], list[int]]:
    """The cores that this process may use, in two equal parts."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("--apart needs two cores")
    middle = len(cores) // 2
    return cores[:middle], cores[middle : 2 * middle]


def holds(rows: Sequence[Row]) -> bool:
    smallest = min(row.ratio(row.totals) for row in rows)
    print(f"smallest ratio of the totals {smallest:.2f}, limit {LIMIT}")
    return smallest >= LIMIT


def holds_within_a_node(rows: Sequence[Row]) -> bool:
    """A device copies one buffer several times as fast as the pages of a state, so what counts is the rate of those."""
    large = [row for row in rows if row.num_tokens >= NODE_TOKENS]
    rates = [row.num_bytes / statistics.median(row.reads) / 1e9 for row in large]
    slowest = min(rates, default=0.0)
    print(f"slowest reads of {NODE_TOKENS} tokens and more: {slowest:.0f} GB/s, limit {NODE_GBPS:.0f}")
    return slowest >= NODE_GBPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 65536])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the transfer configuration")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda[:N]", help="where the pools are")
    parser.add_argument("--from", dest="source", metavar="DEVICE", help="where those of the prefill side are, if apart")
    parser.add_argument("--busy", type=float, metavar="MS", help="steps of this time on the decode side meanwhile")
    parser.add_argument("--apart", action="store_true", help="each side on half of the cores, as on two hosts")
    parser.add_argument("--cores", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in options.set)
    config = msgspec.convert(settings, TransferConfig, strict=False)
    kind = torch.device(options.device).type
    num_pages = POOL_STATES[kind] * max(-(-tokens // 256) for tokens in options.tokens)
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    if options.serve:
        serve(config, num_pages, options.device)
        return 0
    theirs = options.source or options.device
    arguments = [f"--tokens={max(options.tokens)}", f"--device={theirs}", "--set", *options.set]
    if options.apart:
        # Before any thread starts that is to keep to them.
        my_cores, their_cores = halves()
        os.sched_setaffinity(0, my_cores)
        arguments += ["--cores", *map(str, their_cores)]
    source = Source(arguments)
    rank = Rank(config, num_pages, options.device)
    bench = Bench(config, rank, source)
    steps = BusySteps(rank.device, options.busy / 1e3) if options.busy else None
    print(" tokens     pages       MB total ms reads ms   GB/s  bare ms   GB/s  best way  reads  total")
    rows = []
    with steps or nullcontext():
        for num_tokens in options.tokens:
            # A pool of two states is too small for a history.
            for order in ORDERS if kind == "cuda" else (ORDERS[0], ORDERS[2]):
                row = bench.row(num_tokens, order, options.rounds)
                print(row.text, flush=True)
                rows.append(row)
    rank.agent.check_integrity()
    rank.agent.stop()
    source.stop()
    if steps is not None:
        times_ms = [1e3 * seconds for seconds in steps.times_s]
        print(f"steps meanwhile: {statistics.median(times_ms):.1f} ms, the longest {max(times_ms):.1f} ms")
        # Limits are for a device that does nothing else.
        return 0
    return 0 if (holds_within_a_node if config.transport == "intra_node" else holds)(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
