"""What `tools.bench` makes of its records: percentiles, throughput, goodput under an SLO."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from tools.bench_client import Record

SLO_KEYS = ("ttft", "tpot", "e2el")


class Spread(msgspec.Struct, frozen=True):
    """A distribution, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    requests: int
    completed: int
    errors: dict[str, int]
    """Failures by what they said."""
    duration_s: float
    """From the first request sent to the last event."""
    request_throughput: float
    """Completed requests per second."""
    input_throughput: float
    output_throughput: float
    total_throughput: float
    """Tokens per second."""
    per_gpu: float | None
    """`total_throughput` per GPU, where the number of GPUs was given."""
    max_concurrency: int
    """Requests that were under way at one time."""
    user_throughput: float
    """Median over requests of output tokens per second after the first token."""
    ttft: Spread
    tpot: Spread
    itl: Spread
    """Gaps between events. A server that sends several tokens in one event has fewer and longer ones."""
    tbt: Spread
    """Per request the mean of its worst tenth of gaps."""
    e2e: Spread
    slip: Spread
    """How late the client itself was. Close to zero, or the client is what was measured."""
    slo: dict[str, float]
    """Bounds in milliseconds that a good request meets together."""
    goodput: float | None
    """Good requests per second."""
    attainment: float | None
    """Good requests of all that were sent."""


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest ranks of sorted `values`; 0 for none."""
    if not values:
        return 0.0
    position = q / 100 * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def spread(seconds: Sequence[float]) -> Spread:
    ordered = sorted(1000 * value for value in seconds)
    mean = sum(ordered) / len(ordered) if ordered else 0.0
    p50, p90, p99, largest = (percentile(ordered, q) for q in (50, 90, 99, 100))
    return Spread(mean, p50, p90, p99, largest)


def worst_tenth(gaps_s: Sequence[float]) -> float:
    worst = sorted(gaps_s, reverse=True)[: max(1, len(gaps_s) // 10)]
    return sum(worst) / len(worst)


def summarise(records: Sequence[Record], *, slo: dict[str, float], num_gpus: int | None) -> Summary:
    good = [record for record in records if record.error is None]
    began = min((r.sent_s for r in records), default=0.0)
    ended = max((r.sent_s + r.e2e_s for r in records), default=0.0)
    duration_s = max(ended - began, 1e-9)
    outputs = sum(r.output_tokens for r in good)
    inputs = sum(r.prompt_tokens for r in good)
    met = sum(_meets(r, slo) for r in good)
    total = (inputs + outputs) / duration_s
    return Summary(
        requests=len(records),
        completed=len(good),
        errors=dict(Counter(r.error for r in records if r.error is not None)),
        duration_s=duration_s,
        request_throughput=len(good) / duration_s,
        input_throughput=inputs / duration_s,
        output_throughput=outputs / duration_s,
        total_throughput=total,
        per_gpu=total / num_gpus if num_gpus else None,
        max_concurrency=_peak(records),
        user_throughput=percentile(sorted(1 / r.tpot_s for r in good if r.tpot_s > 0), 50),
        ttft=spread([r.ttft_s for r in good]),
        tpot=spread([r.tpot_s for r in good if r.output_tokens > 1]),
        itl=spread([gap for r in good for gap in r.gaps_s]),
        tbt=spread([worst_tenth(r.gaps_s) for r in good if r.gaps_s]),
        e2e=spread([r.e2e_s for r in good]),
        slip=spread([r.slip_s for r in records]),
        slo=slo,
        goodput=met / duration_s if slo else None,
        attainment=met / len(records) if slo and records else None,
    )


def _meets(record: Record, slo: dict[str, float]) -> bool:
    measured = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2el": record.e2e_s}
    return all(1000 * measured[key] <= bound for key, bound in slo.items())


def _peak(records: Sequence[Record]) -> int:
    steps = [(r.sent_s, 1) for r in records] + [(r.sent_s + r.e2e_s, -1) for r in records]
    peak = current = 0
    for _, step in sorted(steps):
        current += step
        peak = max(peak, current)
    return peak


def table(summary: Summary) -> str:
    """For people."""
    s = summary
    lines = [
        f"requests          {s.completed} of {s.requests} completed in {s.duration_s:.2f} s, "
        f"{s.max_concurrency} at once, {s.request_throughput:.2f}/s",
        f"tokens/s          input {s.input_throughput:.1f}, output {s.output_throughput:.1f}, "
        f"total {s.total_throughput:.1f}" + (f", per GPU {s.per_gpu:.1f}" if s.per_gpu is not None else ""),
        f"tokens/s/user     {s.user_throughput:.1f} (median)",
        f"{'ms':16} {'mean':>10} {'p50':>10} {'p90':>10} {'p99':>10} {'max':>10}",
    ]
    for name in ("ttft", "tpot", "itl", "tbt", "e2e", "slip"):
        row: Spread = getattr(s, name)
        values = (row.mean, row.p50, row.p90, row.p99, row.max)
        lines.append(f"{name:16} " + " ".join(f"{value:10.2f}" for value in values))
    if s.goodput is not None and s.attainment is not None:
        bounds = ", ".join(f"{key} <= {bound:g} ms" for key, bound in s.slo.items())
        lines.append(f"goodput           {s.goodput:.2f} requests/s, {s.attainment:.1%} of all sent met {bounds}")
    lines += [f"failed            {count} x {error}" for error, count in s.errors.items()]
    return "\n".join(lines)
