"""Timing of GPU kernels against ceilings measured in the same run.

`isolated`: median of event-timed calls, L2 emptied before each, the launch queue kept ahead of the GPU by a spin.
`in graph`: per call inside a CUDA graph replayed back to back; several functions rotate, so that one call does not find
the previous one's operands in L2. Decode is judged in the graph, prefill isolated.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

Call = Callable[[], object]
FLUSH_BYTES = 1 << 28
SPIN_CYCLES = 400_000


def isolated_us(call: Call, repeats: int = 15) -> float:
    """Median microseconds of one call with a cold L2."""
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        flush.sum()
        torch.cuda._sleep(SPIN_CYCLES)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * float(start.elapsed_time(stop)))
    return statistics.median(times)


def graph_us(calls: Sequence[Call], per_graph: int = 8, repeats: int = 7) -> float:
    """Median microseconds per call of `per_graph` calls, taken in turn from `calls`, in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(per_graph):
            calls[number % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        graph.replay()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * float(start.elapsed_time(stop)) / (2 * per_graph))
    return statistics.median(times)


@dataclass(frozen=True)
class Ceilings:
    """What this card did in this run: TB/s and TFLOP/s."""

    device: str
    copy: float
    bf16: float
    fp8: float

    def describe(self) -> str:
        return f"{self.device}: copy {self.copy:.2f} TB/s, bf16 {self.bf16:.0f}, fp8 {self.fp8:.0f} TFLOP/s"


def _copy_rate() -> float:
    source = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * int(source.numel()) / isolated_us(partial(target.copy_, source), 5) / 1e6


def measure_ceilings() -> Ceilings:
    """A 2 GiB copy (read + written bytes) and 8192^3 matrix products on random data."""
    size = 8192
    flop = 2 * size**3
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    fp8 = partial(torch._scaled_mm, a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return Ceilings(
        torch.cuda.get_device_name(),
        _copy_rate(),
        flop / isolated_us(partial(torch.matmul, a, b), 5) / 1e6,
        flop / isolated_us(fp8, 5) / 1e6,
    )


@dataclass
class Table:
    """Measured rows, printed as they come and as markdown at the end."""

    ceilings: Ceilings
    lines: list[str] = field(default_factory=list)

    def add(
        self,
        kernel: str,
        shape: str,
        us: float,
        num_bytes: float,
        flop: float = 0.0,
        unit: str = "bf16",
        peer: float | None = None,
        how: str = "graph",
    ) -> None:
        """`num_bytes`: every operand once. `peer`: measured figure of the best peer on an H200, for scale."""
        rate = self.ceilings.bf16 if unit == "bf16" else self.ceilings.fp8
        bound = max(num_bytes / self.ceilings.copy / 1e6, flop / rate / 1e6)
        rates = f"{num_bytes / us / 1e3:,.0f} | {flop / us / 1e6:,.0f}"
        line = f"| {kernel} | {shape} | {how} | {us:.1f} | {rates} | {bound:.1f} | {bound / us:.0%} | {peer or ''} |"
        print(line, flush=True)
        self.lines.append(line)

    def failed(self, kernel: str, error: Exception) -> None:
        line = f"| {kernel} | failed: {type(error).__name__}: {str(error)[:200]} |"
        print(line, flush=True)
        self.lines.append(line)

    def markdown(self) -> str:
        head = "| kernel | shape | how | us | GB/s | TFLOP/s | bound us | of bound | peer us (H200) |"
        return "\n".join((self.ceilings.describe(), "", head, "|---" * 9 + "|", *self.lines, ""))
