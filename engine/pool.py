"""Numbered pieces of memory with one owner each: the bookkeeping behind the page pool and the slot pool.

Every id of 0..count-1 is free or in exactly one live `Holding`. A holding says who answers for its ids and why they
are not free:

    free ──take──► REQUEST ──► TRANSFER ──► QUARANTINE
      ▲               │  ▲________│              │
      └───────────────┴────give_back─────────────┘

REQUEST: a request computes with them. TRANSFER: a transfer reads or writes them. QUARANTINE: a transfer is over, but a
read into them may still be in flight. The pool knows no torch and no clock; it only counts.
"""

import enum
from collections.abc import Iterable

from engine.free_runs import FreeRuns


class Use(enum.Enum):
    """Why ids are not free."""

    REQUEST = "request"
    TRANSFER = "transfer"
    QUARANTINE = "quarantine"


class PoolExhausted(Exception):
    """Fewer ids are free than were asked for. Callers look at `num_free` first; seeing this is a scheduling bug."""


class PoolCorrupted(Exception):
    """The audit found ids that are lost, shared, or owned by nobody who is alive."""


class Holding:
    """Ids taken together. `ids` is in order of taking and is changed by the pool only."""

    __slots__ = ("ids", "owner", "use")

    def __init__(self, owner: str, use: Use, ids: list[int]) -> None:
        self.owner = owner
        """A request id, or a transfer id while `use` is not REQUEST; for messages and audits."""
        self.use = use
        self.ids = ids

    def __repr__(self) -> str:
        return f"Holding({self.use.value} {self.owner!r}, {self.ids})"


class Pool:
    """Owner of the ids 0..count-1 of one kind of memory."""

    def __init__(self, kind: str, count: int) -> None:
        if count < 1:
            raise ValueError(f"a pool of {count} {kind}s")
        self.kind = kind
        self.count = count
        self._free = FreeRuns(count)
        self._live: dict[int, Holding] = {}
        self._counts = dict.fromkeys(Use, 0)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_used(self, use: Use) -> int:
        """Ids in holdings of this use."""
        return self._counts[use]

    def take(self, owner: str, count: int) -> Holding:
        """A new REQUEST holding of `count` ids (0 is allowed: it can be extended later). Raises PoolExhausted."""
        holding = Holding(owner, Use.REQUEST, self._pop(owner, count))
        self._live[id(holding)] = holding
        self._counts[Use.REQUEST] += count
        return holding

    def extend(self, holding: Holding, count: int = 1) -> list[int]:
        """Add `count` ids to a REQUEST holding; returns the new ones. Raises PoolExhausted."""
        assert id(holding) in self._live, holding
        assert holding.use is Use.REQUEST, holding
        new = self._pop(holding.owner, count)
        holding.ids.extend(new)
        self._counts[Use.REQUEST] += count
        return new

    def assign(self, holding: Holding, use: Use, owner: str) -> None:
        """The same ids, now for another use on behalf of `owner`."""
        assert id(holding) in self._live, holding
        assert holding.use is not Use.QUARANTINE, f"{holding} leaves quarantine only to be free"
        self._counts[holding.use] -= len(holding.ids)
        self._counts[use] += len(holding.ids)
        holding.use, holding.owner = use, owner

    def give_back(self, holding: Holding) -> None:
        """Free all ids of a holding and end it."""
        assert self._live.pop(id(holding), None) is holding, f"{holding} was given back twice"
        self._counts[holding.use] -= len(holding.ids)
        self._free.give_back(holding.ids)
        holding.ids = []

    def _pop(self, owner: str, count: int) -> list[int]:
        if count > len(self._free):
            raise PoolExhausted(f"{owner}: {count} {self.kind}s wanted, {len(self._free)} of {self.count} free")
        return self._free.take(count)

    def check_integrity(self, holdings: Iterable[Holding] | None = None) -> None:
        """Audit: every id is free or held exactly once, the gauges are right, and `holdings` (if given: everything the
        caller knows to be in use) are exactly the live ones. Raises PoolCorrupted naming ids and owners.
        """
        owner_of: dict[int, str] = {}
        for index in self._free:
            self._claim(owner_of, index, "free")
        counts = dict.fromkeys(Use, 0)
        for holding in self._live.values():
            counts[holding.use] += len(holding.ids)
            for index in holding.ids:
                self._claim(owner_of, index, f"{holding.use.value} {holding.owner}")
        lost = sorted(set(range(self.count)) - owner_of.keys())
        if lost:
            raise PoolCorrupted(f"{self.kind}s {lost} are neither free nor held")
        if counts != self._counts:
            raise PoolCorrupted(f"{self.kind} gauges say {self._counts}, the holdings say {counts}")
        if holdings is None:
            return
        known = {id(holding): holding for holding in holdings}
        leaked = [holding for key, holding in self._live.items() if key not in known]
        if leaked:
            raise PoolCorrupted(f"{self.kind}s held by nobody alive: {leaked}")
        dangling = [holding for key, holding in known.items() if key not in self._live]
        if dangling:
            raise PoolCorrupted(f"{self.kind} holdings in use after they were given back: {dangling}")

    def _claim(self, owner_of: dict[int, str], index: int, owner: str) -> None:
        if not 0 <= index < self.count:
            raise PoolCorrupted(f"{self.kind} {index} of {owner} does not exist (pool of {self.count})")
        if index in owner_of:
            raise PoolCorrupted(f"{self.kind} {index} belongs to {owner_of[index]} and to {owner}")
        owner_of[index] = owner
