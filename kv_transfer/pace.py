"""When to look at reads again: looking takes time from those who move the bytes, not looking lets finished reads wait.

The pause is a quarter of what is left until the expected end, so a long wait costs few looks and its end is seen soon.
Reads that are under way together end together: how far they are is reckoned from the rate and from the time.
"""

_SHORTEST_S, _LONGEST_S = 0.00005, 0.004
_FIRST_S = 0.0003
"""While no rate is known."""
_MEMORY_BYTES = 64 << 20
"""What arrived before the last so many bytes says less and less about the rate."""


class Pace:
    """The rate at which bytes arrive, all reads together. Times are seconds of one clock."""

    def __init__(self) -> None:
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
        moved = self._moved(now)
        if self._bytes > _MEMORY_BYTES:
            self._bytes, self._seconds = self._bytes / 2, self._seconds / 2
        self._bytes += num_bytes
        self._seconds += now - self._seen_at
        self._seen_at = now
        self._under_way = min(max(moved - num_bytes, 0.0), flying)

    def nap_s(self, now: float, flying: int, left: int) -> float:
        """How long to leave them alone. `left`: bytes of reads under way and of all that follow."""
        if not left:
            return _SHORTEST_S
        if not self._seconds:
            return _FIRST_S
        # Past the expected end the pauses grow again: what is late may stay away for long.
        waits_for = min(abs(left - self._moved(now)), flying)
        return min(max(waits_for * self._seconds / self._bytes / 4, _SHORTEST_S), _LONGEST_S)

    def _moved(self, now: float) -> float:
        """Bytes of reads under way that should have been moved by now."""
        if not self._seconds:
            return 0.0
        return self._under_way + (now - self._seen_at) * self._bytes / self._seconds
