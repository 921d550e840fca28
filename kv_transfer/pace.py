"""When to look at reads again: looking takes time from those who move the bytes, not looking lets finished reads wait.

The next look comes half way to the end that is hoped for, at twice the usual rate: rates change from one read to the
next. Reads that are under way together end together, so how far they are is reckoned from the rate and from the time.
"""

_FEW_CORES = 4
_SHORTEST_S, _SHORTEST_OF_MANY_CORES_S, _LONGEST_S = 0.00015, 0.00004, 0.004
"""On few cores who looks takes time from those who move the bytes, on many only from this process's interpreter."""
_FIRST_S = 0.0003
"""While no rate is known."""
_AFTER_S = 0.00005
"""When nothing is left."""
_HOPE = 2.0
_LATE = 1 / 16
"""Past the hoped end pauses are this part of the delay: what is late may stay away for long."""
_MEMORY_BYTES = 64 << 20
"""What arrived before the last so many bytes says less and less about the rate."""


class Pace:
    """The rate at which bytes arrive, all reads together. Times are seconds of one clock.

    num_cores: that the process may use.
    """

    def __init__(self, num_cores: int) -> None:
        self._shortest_s = _SHORTEST_S if num_cores <= _FEW_CORES else _SHORTEST_OF_MANY_CORES_S
        self._seconds = self._bytes = 0.0
        """The rate is their ratio; older ones have faded."""
        self._seen_at = 0.0
        """When bytes arrived last, or reading began."""
        self._under_way = 0.0
        """Bytes that had been moved then, of reads that had not ended."""

    def begin(self, now: float) -> None:
        """Reads start after a time without any."""
        self._seen_at, self._under_way = now, 0.0

    def arrive(self, num_bytes: int, flying: int, now: float) -> None:
        """A read ended. `flying`: bytes of reads under way, without it."""
        moved = self._under_way
        if self._seconds:
            moved += (now - self._seen_at) * self._bytes / self._seconds
        if self._bytes > _MEMORY_BYTES:
            self._bytes, self._seconds = self._bytes / 2, self._seconds / 2
        self._bytes += num_bytes
        self._seconds += now - self._seen_at
        self._seen_at = now
        self._under_way = min(max(moved - num_bytes, 0.0), flying)

    def nap_s(self, now: float, flying: int, left: int) -> float:
        """How long to leave them alone. `left`: bytes of reads under way and of all that follow."""
        if not left:
            return _AFTER_S
        if not self._seconds:
            return _FIRST_S
        s_per_byte = self._seconds / self._bytes / _HOPE
        until_end_s = (left - self._under_way) * s_per_byte - (now - self._seen_at)
        nap_s = min(until_end_s, flying * s_per_byte) / 2 if until_end_s > 0 else -until_end_s * _LATE
        return min(max(nap_s, self._shortest_s), _LONGEST_S)
