"""When to look at reads again: looking takes time from those who move the bytes, not looking lets finished reads wait.

The pause is a quarter of what is left until the expected end, so a long wait costs few looks and its end is seen soon.
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

    def begin(self, now: float) -> None:
        """Reads start after a time without any."""
        self._seen_at = now

    def arrive(self, num_bytes: int, now: float) -> None:
        if self._bytes > _MEMORY_BYTES:
            self._bytes, self._seconds = self._bytes / 2, self._seconds / 2
        self._bytes += num_bytes
        self._seconds += now - self._seen_at
        self._seen_at = now

    def nap_s(self, now: float, flying: int, left: int) -> float:
        """How long to leave them alone. `flying`: bytes of reads under way, `left`: of these and all that follow."""
        if not left:
            return _SHORTEST_S
        if not self._seconds:
            return _FIRST_S
        s_per_byte = self._seconds / self._bytes
        # Past the expected end the pauses grow again: what is late may stay away for long.
        until_end_s = abs(self._seen_at + left * s_per_byte - now)
        return min(max(min(until_end_s, flying * s_per_byte) / 4, _SHORTEST_S), _LONGEST_S)
