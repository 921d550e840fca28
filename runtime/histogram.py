"""Counts of values by size: cheap enough for every request and every step, and small enough to be sent along."""

from bisect import bisect_left

import msgspec

REQUEST_SECONDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0
)  # fmt: skip
"""Bounds for times of whole requests."""
STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
"""Bounds for the tokens of one step."""


class HistogramCounts(msgspec.Struct, frozen=True, array_like=True):
    """A histogram as it was: `counts[i]` values up to bound i and above the one before, the last count without a bound.

    Empty: nothing is known.
    """

    counts: tuple[int, ...] = ()
    total: float = 0.0
    """Sum of the values."""


class Histogram:
    """Counts values from one thread."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def counts(self) -> HistogramCounts:
        return HistogramCounts(tuple(self._counts), self._total)


def cumulative(bounds: tuple[float, ...], counts: HistogramCounts) -> list[tuple[str, float]]:
    """Prometheus' rows: how many values were at most each bound."""
    rows: list[tuple[str, float]] = []
    running = 0
    for bound, count in zip((*map(str, bounds), "+Inf"), counts.counts or (0,) * (len(bounds) + 1), strict=True):
        running += count
        rows.append((bound, running))
    return rows
