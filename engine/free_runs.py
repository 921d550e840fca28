"""Free ids as runs of neighbours, so that what is taken together lies together however long the pool has been in use.

Neighbours on both sides of a transfer are one read: a state of 32 pages is then one or two of them. Taking goes by best
fit (the shortest run that holds all), and runs that touch become one when they are given back. With r runs, which are
far fewer than ids, taking and giving back a run cost O(log r) comparisons and moving part of a list of r entries.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator


class FreeRuns:
    """A set of ids, at first 0..count-1."""

    def __init__(self, count: int) -> None:
        self._count = 0
        # A run is [start, end). Each is known by either bound, and to `_by_length` as (length, start).
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []
        self._add(0, count)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for start, end in self._ends.items():
            yield from range(start, end)

    @property
    def num_runs(self) -> int:
        return len(self._ends)

    def take(self, count: int) -> list[int]:
        """Remove `count` ids, of which there must be so many: neighbours if there are, else from the longest runs."""
        assert count <= self._count
        ids: list[int] = []
        while len(ids) < count:
            missing = count - len(ids)
            place = bisect_left(self._by_length, (missing, -1))
            length, start = self._by_length[min(place, len(self._by_length) - 1)]
            self._remove(start)
            taken = min(missing, length)
            ids.extend(range(start, start + taken))
            if taken < length:
                self._add(start + taken, start + length)
        return ids

    def give_back(self, ids: Iterable[int]) -> None:
        """Add ids that are not in the set, in any order."""
        for start, end in _runs(ids):
            if end in self._ends:
                end = self._remove(end)
            if start in self._starts:
                start = self._starts[start]
                self._remove(start)
            self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        self._ends[start], self._starts[end] = end, start
        insort(self._by_length, (end - start, start))
        self._count += end - start

    def _remove(self, start: int) -> int:
        """-> its end."""
        end = self._ends.pop(start)
        del self._starts[end]
        del self._by_length[bisect_left(self._by_length, (end - start, start))]
        self._count -= end - start
        return end


def _runs(ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Neighbours that follow each other, as [start, end)."""
    start = end = -1
    for index in ids:
        if index != end:
            if end > start:
                yield start, end
            start = index
        end = index + 1
    if end > start:
        yield start, end
