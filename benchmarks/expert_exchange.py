"""The exchange of tokens between ranks that share the experts: is it right, eager and captured, and how long is it?

    python -m benchmarks.expert_exchange [--device cuda|cpu] [--ranks N] [--tokens 64,512,4096] [--hidden 4096]

One process a rank with the real group, NCCL on GPUs (a GPU each; a single rank on a single GPU shows whether the calls
and their capture work at all) and gloo on CPUs. The experts are stand-ins whose sums are known exactly, so every rank
checks what came back; a captured exchange is replayed on other tokens than it was captured with. Columns: tokens per
rank, microseconds of one exchange with its rows packed, unpacked and added up (median, of all ranks the slowest), the
bytes a rank sends, and what that makes in GB/s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from benchmarks.ports import free_port
from engine.expert_exchange import ExpertExchange
from engine.parallel import StepPlan
from engine.rank_group import RankGroup
from kernels.exchange_rows import QuantizedTokens, RowFormat
from model.moe import ExpertCompute

T = TypeVar("T")
TOPK = 6
EXPERTS = 256
TIMEOUT_S = 60.0


class Case(msgspec.Struct, frozen=True):
    """What one size took on one rank."""

    tokens: int
    eager_us: float
    captured_us: float | None
    sent_bytes: int


class FixedPlan:
    """Every rank has as many tokens."""

    def __init__(self, ranks: int, tokens: int) -> None:
        self.plan = StepPlan((tokens,) * ranks, decode_only=True)


def tokens_of(rank: int, count: int, hidden: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Small whole numbers, whose sums are exact however they are rounded on the way."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randint(-8, 9, (count, hidden), generator=generator).to(torch.bfloat16)
    experts = torch.rand(count, EXPERTS, generator=generator).topk(TOPK).indices
    weights = torch.randint(1, 5, (count, TOPK), generator=generator).float()
    return x.to(device), experts.to(device), weights.to(device)


def expected(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    return x.float() * (weights * (1 + experts % 3)).sum(1, keepdim=True)


def stand_in(rank: int, ranks: int) -> ExpertCompute:
    """The sums over the experts of one rank."""
    first, end = EXPERTS * rank // ranks, EXPERTS * (rank + 1) // ranks

    def compute(
        x: Tensor | QuantizedTokens, experts: Tensor, weights: Tensor, /, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        values = x if isinstance(x, Tensor) else x.values()
        mine = (experts >= first) & (experts < end)
        return (values.float() * torch.where(mine, weights * (1 + experts % 3), 0.0).sum(1, keepdim=True)).to(dtype)

    return compute


def measure(group: RankGroup, tokens: int, hidden: int, part_tokens: int) -> Case:
    rank, device = group.rank, group.device
    exchange = ExpertExchange(
        group, FixedPlan(group.size, tokens), num_experts=EXPERTS, quantised=True, part_tokens=part_tokens
    )
    inputs = tokens_of(rank, tokens, hidden, 0, device)
    nothing = torch.zeros(tokens, hidden, device=device)
    compute = stand_in(rank, group.size)

    def run() -> Tensor:
        return exchange.send(*inputs).through(compute, nothing)

    assert torch.equal(run(), expected(*inputs)), f"{tokens} tokens: the sums are wrong"
    eager_us = timed(run, device)
    captured_us = None
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = run()
        for kept, other in zip(inputs, tokens_of(rank, tokens, hidden, 1, device), strict=True):
            kept.copy_(other)
        graph.replay()
        assert torch.equal(output, expected(*inputs)), f"{tokens} tokens: the captured sums are wrong"
        captured_us = timed(graph.replay, device)
    row_bytes = RowFormat(hidden, TOPK, torch.bfloat16, quantised=True).row_bytes
    return Case(tokens, eager_us, captured_us, tokens * (group.size - 1) * (row_bytes + 4 * hidden))


def timed(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median microseconds."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)


def run_rank(rank: int, ranks: int, port: int, kind: str, sizes: list[int], hidden: int, part: int) -> list[Case]:
    """Runs in a process of its own."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    group = RankGroup(
        rank, ranks, host="127.0.0.1", meeting=f"127.0.0.1:{port}", device=device, timeout_s=TIMEOUT_S, terms={}
    )
    try:
        with torch.inference_mode():
            return [measure(group, tokens, hidden, part) for tokens in sizes]
    finally:
        group.close()


def on_every_rank(ranks: int, run: Callable[..., T], *arguments: object) -> list[T]:
    """What `run(rank, ranks, port, *arguments)` returns in a process for each rank; they meet at the port."""
    port = free_port()
    with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(run, rank, ranks, port, *arguments) for rank in range(ranks)]
        return [future.result() for future in running]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="default: the GPUs there are, or 2 on a CPU")
    parser.add_argument("--tokens", default="64,512,4096,16384")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--part-tokens", type=int, default=4096)
    options = parser.parse_args(arguments)
    ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 2)
    sizes = [int(size) for size in options.tokens.split(",")]
    results = on_every_rank(ranks, run_rank, options.device, sizes, options.hidden, options.part_tokens)
    print(f"{ranks} rank(s), {options.device}, {options.hidden} channels, e4m3 rows out, float32 sums back; all exact")
    print(f"{'tokens':>8s}{'eager us':>12s}{'captured us':>13s}{'sent MB':>10s}{'GB/s':>8s}")
    for cases in zip(*results, strict=True):
        eager = max(case.eager_us for case in cases)
        captured = None if cases[0].captured_us is None else max(case.captured_us or 0.0 for case in cases)
        sent = cases[0].sent_bytes
        rate = sent / (captured or eager) / 1e3
        shown = f"{captured:13.0f}" if captured is not None else f"{'-':>13s}"
        print(f"{cases[0].tokens:8d}{eager:12.0f}{shown}{sent / 1e6:10.1f}{rate:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
