"""Ranks that step together, for every distribution of work over them: does any of them ever wait for nothing, and what
does agreeing on a step cost the host?

    python -m benchmarks.lockstep [--ranks 4] [--steps 10000] [--pin]

Each rank is a process with the real group and the real lockstep; a step is empty, so all that is measured is what
several ranks add to a step of one. Columns: steps run, rounds (a round that ends with everybody idle runs no step),
median and 99th percentile of the time that passes in a round on rank 0, and CPU time of the step thread per round, the
highest of all ranks. With more ranks than cores time that passes is mostly waiting for a core; --pin gives each of as
many ranks as there are cores one of its own. A stall is a round that took over a second. Limit: 150 us of CPU a round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from engine.lockstep import Lockstep
from engine.parallel import StepIntent
from engine.peer_mesh import PeerMesh
from engine.rank_group import RankGroup

LIMIT_US = 150.0
STALL_S = 1.0
TIMEOUT_S = 60.0


class Work(msgspec.Struct, frozen=True):
    """Who has how much to do in every step."""

    tokens: NDArray[np.int64]
    """[steps, ranks], no row of zeros."""
    pause_before: NDArray[np.bool_]
    """[steps]: all ranks fall idle before this step."""


def _one_busy(steps: int, ranks: int) -> Work:
    tokens = np.zeros((steps, ranks), np.int64)
    tokens[:, 0] = 3
    return Work(tokens, np.zeros(steps, np.bool_))


def _all_busy(steps: int, ranks: int) -> Work:
    return Work(np.tile(np.arange(1, ranks + 1), (steps, 1)), np.zeros(steps, np.bool_))


def _bursts(steps: int, ranks: int) -> Work:
    return Work(np.ones((steps, ranks), np.int64), np.arange(steps) % 5 == 0)


def _alternating(steps: int, ranks: int) -> Work:
    return Work(np.eye(ranks, dtype=np.int64)[np.arange(steps) % ranks], np.zeros(steps, np.bool_))


def _random(steps: int, ranks: int) -> Work:
    random = np.random.default_rng(7)
    tokens = random.integers(0, 3, (steps, ranks))
    tokens[~tokens.any(1), random.integers(ranks)] = 1
    return Work(tokens, random.random(steps) < 0.1)


def _ends(steps: int, ranks: int) -> Work:
    """A request of one token after the other, each on another rank, with nothing else to do."""
    return Work(np.eye(ranks, dtype=np.int64)[np.arange(steps) % ranks], np.ones(steps, np.bool_))


PATTERNS: dict[str, Callable[[int, int], Work]] = {
    "all busy": _all_busy,
    "one busy rank": _one_busy,
    "bursts": _bursts,
    "alternating": _alternating,
    "random": _random,
    "an end on every step": _ends,
}


class Walk(msgspec.Struct, frozen=True):
    """What one rank saw."""

    steps: list[tuple[int, ...]]
    """Tokens of all ranks in each step that ran."""
    rounds: int
    round_us: list[float]
    """Time that passed in each round of this rank."""
    cpu_us: float
    """CPU time of its thread per round."""


def walk(
    lockstep: Lockstep, mesh: PeerMesh, rank: int, work: Work, on_step: Callable[[], object] = lambda: None
) -> Walk:
    """Take part in all steps as an engine does: asleep when there is nothing to do and nobody calls."""
    steps: list[tuple[int, ...]] = []
    times: list[float] = []
    first_round = lockstep.num_rounds
    cpu_s = 0.0

    def agree(tokens: int) -> tuple[int, ...]:
        nonlocal cpu_s
        began, began_cpu = time.perf_counter(), time.thread_time()
        plan = lockstep.agree(StepIntent(num_tokens=tokens, decode_only=True))
        cpu_s += time.thread_time() - began_cpu
        times.append(1e6 * (time.perf_counter() - began))
        return plan.num_tokens

    for number, (mine, pause) in enumerate(zip(work.tokens[:, rank].tolist(), work.pause_before.tolist(), strict=True)):
        if pause and number:
            assert not any(agree(0)), "a step where all should be idle"
        if not mine:
            deadline = time.monotonic() + TIMEOUT_S
            while not lockstep.busy:
                assert time.monotonic() < deadline, f"rank {rank} was not woken for step {number}"
                select.select([mesh], [], [], 0.5)
        steps.append(agree(mine))
        on_step()
    assert not any(agree(0)), "work after the last step"
    return Walk(steps, lockstep.num_rounds - first_round, times, 1e6 * cpu_s / max(1, len(times)))


def run_rank(rank: int, size: int, port: int, patterns: list[str], steps: int, cores: list[int]) -> dict[str, Walk]:
    """All patterns on one rank. Runs in a process of its own."""
    if cores:
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    group = RankGroup(
        rank, size, host="127.0.0.1", meeting=f"127.0.0.1:{port}", device=torch.device("cpu"), timeout_s=TIMEOUT_S,
        terms={},
    )  # fmt: skip
    lockstep = Lockstep(group.mesh, size, TIMEOUT_S)
    try:
        walks = {}
        for pattern in patterns:
            work = PATTERNS[pattern](steps, size)
            with tqdm(total=steps, desc=pattern, disable=rank > 0, leave=False) as bar:
                walks[pattern] = walk(lockstep, group.mesh, rank, work, bar.update)
            lockstep.begin(TIMEOUT_S)
        lockstep.leave()
        return walks
    finally:
        group.close()


def check(pattern: str, steps: int, walks: list[Walk]) -> int:
    """Every rank saw the same steps, and those were the work. -> stalls."""
    work = PATTERNS[pattern](steps, len(walks))
    expected = [tuple(row) for row in work.tokens.tolist()]
    for rank, seen in enumerate(walks):
        assert seen.steps == expected, f"{pattern}: rank {rank} saw other steps"
    return sum(us > 1e6 * STALL_S for seen in walks for us in seen.round_us)


def idle_cost_us(calls: int = 10_000) -> float:
    """CPU of asking an idle group of two whether there is anything to do."""
    ours, theirs = socket.socketpair()
    mesh = PeerMesh(0, {1: ours}, 24)
    lockstep = Lockstep(mesh, 2, TIMEOUT_S)
    began = time.thread_time()
    for _ in range(calls):
        assert not lockstep.busy
        assert not lockstep.agree(StepIntent(num_tokens=0, decode_only=True)).runs
    took = time.thread_time() - began
    assert lockstep.num_rounds == 0, "an idle group made rounds"
    mesh.close()
    theirs.close()
    return 1e6 * took / calls


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--pin", action="store_true", help="a core for each rank; as many ranks as cores")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if arguments.pin else []
    ranks = len(cores) or arguments.ranks
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    patterns = list(PATTERNS)
    with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(run_rank, rank, ranks, port, patterns, arguments.steps, cores) for rank in range(ranks)]
        results = [future.result() for future in started]
    where = f"{os.cpu_count()} cores{', one each' if cores else ''}"
    print(f"{ranks} ranks on {where}; {arguments.steps} steps of every kind")
    print(f"asking an idle group: {idle_cost_us():.1f} us\n")
    print(f"{'work':24s}{'steps':>8s}{'rounds':>8s}{'median us':>11s}{'p99 us':>9s}{'CPU us':>8s}{'stalls':>8s}")
    worst, stalls = 0.0, 0
    for pattern in patterns:
        walks = [result[pattern] for result in results]
        stalled = check(pattern, arguments.steps, walks)
        first, cpu_us = walks[0], max(seen.cpu_us for seen in walks)
        print(
            f"{pattern:24s}{len(first.steps):8d}{first.rounds:8d}{np.median(first.round_us):11.0f}"
            f"{np.quantile(first.round_us, 0.99):9.0f}{cpu_us:8.1f}{stalled:8d}"
        )
        worst, stalls = max(worst, cpu_us), stalls + stalled
    verdict = "within" if worst <= LIMIT_US and not stalls else "OVER"
    print(f"\nhighest CPU per round {worst:.1f} us, {stalls} stalls: {verdict} the limit of {LIMIT_US:g} us and none")
    return int(verdict == "OVER")


if __name__ == "__main__":
    sys.exit(main())
