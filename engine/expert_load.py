"""How many tokens chose which expert: read from the device now and then, and told to the API process."""

import time

from torch import Tensor

from runtime.requests import ExpertLoad


class ExpertLoadReport:
    """One rank's counters. Reading them waits for the device, so it is done seldom and not while nothing runs."""

    def __init__(self, counts_LE: Tensor, rank: int, interval_s: float) -> None:
        """counts_LE: int64 [layers, experts], counted since the start."""
        self._counts = counts_LE
        self._rank = rank
        self._interval_s = interval_s
        self._next = 0.0
        self._steps = 0

    def take(self, steps: int) -> ExpertLoad | None:
        """What there is to say after so many steps of the engine; None: nothing new, or too soon."""
        now = time.monotonic()
        if now < self._next or steps == self._steps:
            return None
        self._next, self._steps = now + self._interval_s, steps
        return ExpertLoad(self._rank, self._counts.shape[0], self._counts.cpu().contiguous().numpy().tobytes())
