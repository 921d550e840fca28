"""When things happen to requests: waiting, the prompt, and all of the computing, as the engine sees them.

Taken when a request is over or held for another rank, and only of those that got a token, as vLLM does. A request whose
state comes from another rank has no prompt to compute: from its turn to its first token is how long the state took.
"""

import time

from runtime.histogram import REQUEST_SECONDS, Histogram


class RequestClock:
    """The moments of one request, on the monotonic clock."""

    __slots__ = ("_arrived", "_began", "_first_token")

    def __init__(self) -> None:
        self._arrived = time.monotonic()
        self._began: float | None = None
        self._first_token: float | None = None

    def begin(self) -> None:
        """It left the queue. What follows a preemption is not counted as waiting."""
        if self._began is None:
            self._began = time.monotonic()

    def first_token(self) -> None:
        if self._first_token is None:
            self._first_token = time.monotonic()

    def spans(self) -> tuple[float, float, float] | None:
        """Seconds in the queue, to the first token, and in all until now; None before the first token."""
        if self._began is None or self._first_token is None:
            return None
        return self._began - self._arrived, self._first_token - self._began, time.monotonic() - self._began


class RequestTimes:
    """What the clocks of all requests said."""

    def __init__(self) -> None:
        self.queue = Histogram(REQUEST_SECONDS)
        self.prefill = Histogram(REQUEST_SECONDS)
        self.inference = Histogram(REQUEST_SECONDS)

    def over(self, clock: RequestClock) -> None:
        spans = clock.spans()
        if spans is not None:
            for histogram, seconds in zip((self.queue, self.prefill, self.inference), spans, strict=True):
                histogram.observe(seconds)
