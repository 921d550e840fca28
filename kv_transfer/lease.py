"""A lease as its reader sees it: counted from before the question was sent, so it always ends before the giver's.

Prefill starts the lease when it *receives* message number `ask` and answers with that number. The answer may be late,
reordered or lost: the reader looks up when it sent `ask` and adds the seconds. Both sides only need clocks that run at
the same rate; no time of day ever crosses.
"""

_MAX_MARGIN = 0.25
"""Of a lease's length: leases of a giver that is configured otherwise are still usable."""
_RENEW_AFTER = 0.25


class ReaderLease:
    """Times are the caller's monotonic clock, in seconds. `length_s` is how long the giver says its leases are."""

    def __init__(self, margin_s: float, length_s: float) -> None:
        self._margin_s = min(margin_s, _MAX_MARGIN * length_s)
        self._renew_after_s = _RENEW_AFTER * length_s
        self._asked: dict[int, float] = {}
        self._last_ask = 0
        self._last_asked_at = 0.0
        self.end: float | None = None
        """What is read until then is valid; None before the first grant."""

    def ask(self, now: float) -> int:
        """The number for the next message, which is about to be sent."""
        self._last_ask += 1
        self._last_asked_at = self._asked[self._last_ask] = now
        return self._last_ask

    def grant(self, ask: int, seconds: float) -> None:
        """The peer answered `ask`. Unknown and outdated numbers are ignored."""
        asked = self._asked.get(ask)
        if asked is None:
            return
        self._asked = {number: at for number, at in self._asked.items() if number >= ask}
        end = asked + seconds - self._margin_s
        self.end = end if self.end is None else max(self.end, end)

    def should_renew(self, now: float) -> bool:
        """Whether a quarter of the lease has passed since the last question."""
        return now - self._last_asked_at >= self._renew_after_s

    def covers(self, moment: float) -> bool:
        return self.end is not None and moment <= self.end
