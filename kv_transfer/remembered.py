"""What to keep of transfers that are over: enough to answer late messages, bounded in time and number."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class Remembered(Generic[V]):
    """A map that forgets entries `keep_s` after they were set, the oldest first past `max_entries`."""

    def __init__(self, clock: Callable[[], float], keep_s: float, max_entries: int = 65536) -> None:
        self._clock = clock
        self._keep_s = keep_s
        self._max_entries = max_entries
        self._entries: OrderedDict[str, tuple[float, V]] = OrderedDict()

    def put(self, key: str, value: V) -> None:
        self._entries.pop(key, None)
        self._entries[key] = (self._clock() + self._keep_s, value)
        self._forget_old()

    def pop(self, key: str) -> V | None:
        self._forget_old()
        entry = self._entries.pop(key, None)
        return None if entry is None else entry[1]

    def get(self, key: str) -> V | None:
        self._forget_old()
        entry = self._entries.get(key)
        return None if entry is None else entry[1]

    def __len__(self) -> int:
        return len(self._entries)

    def _forget_old(self) -> None:
        now = self._clock()
        while self._entries:
            key = next(iter(self._entries))
            if self._entries[key][0] > now and len(self._entries) <= self._max_entries:
                return
            del self._entries[key]
