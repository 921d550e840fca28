"""Pages as an engine's pool hands them out when states of all lengths have come and gone for long."""

import random

from engine.free_runs import FreeRuns


class UsedPool:
    """Three quarters full. Between two hand-offs other states come and go."""

    def __init__(self, num_pages: int, longest: int) -> None:
        """longest: pages of the largest other state."""
        self._free = FreeRuns(num_pages)
        self._spare = num_pages // 4
        self._longest = longest
        self._states: list[list[int]] = []
        for _ in range(200):
            self._come_and_go()

    def take(self, count: int) -> list[int]:
        for _ in range(5):
            self._come_and_go()
        return self._take(count)

    def _come_and_go(self) -> None:
        self._take(random.randint(1, self._longest))

    def _take(self, count: int) -> list[int]:
        while len(self._free) < count + self._spare:
            self._free.give_back(self._states.pop(random.randrange(len(self._states))))
        self._states.append(self._free.take(count))
        return self._states[-1]
