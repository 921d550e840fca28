"""A request's state is some pages and one slot: taken, lent and given back together.

Steps are launched before their results are known, so a state may be given back while a step that writes to it is still
in flight. Its memory is free for others only when every step launched before has been collected: the next owner might
be a transfer, whose writes no stream orders after that step's.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from engine.page_pool import PagePool
from engine.pool import Holding, Use
from engine.slot_pool import SlotPool


@dataclass(frozen=True, slots=True)
class StateHolding:
    """The ids behind one request's state."""

    pages: Holding
    slot: Holding

    @property
    def page_ids(self) -> list[int]:
        """In order of tokens."""
        return self.pages.ids

    @property
    def slot_id(self) -> int:
        return self.slot.ids[0]


class StatePools:
    """Both pools of a rank."""

    def __init__(self, pages: PagePool, slots: SlotPool) -> None:
        self.pages = pages
        self.slots = slots
        self._launched = self._collected = 0
        self._fenced: deque[tuple[int, StateHolding]] = deque()
        """Given back, free when as many steps as said have been collected."""

    def step_launched(self) -> None:
        """A step that may write to any state taken so far is under way."""
        self._launched += 1

    def step_collected(self) -> None:
        """The oldest step under way has ended."""
        self._collected += 1
        while self._fenced and self._fenced[0][0] <= self._collected:
            self._free(self._fenced.popleft()[1])

    def take(self, owner: str, num_tokens: int) -> StateHolding:
        """A slot, and pages for `num_tokens` tokens. Raises PoolExhausted and takes nothing if there are not both."""
        slot = self.slots.take(owner, 1)
        try:
            return StateHolding(self.pages.take(owner, self.pages.pages_for(num_tokens)), slot)
        except Exception:
            self.slots.give_back(slot)
            raise

    def grow(self, state: StateHolding) -> int:
        """One more page; returns its id."""
        return self.pages.extend(state.pages)[0]

    def assign(self, state: StateHolding, use: Use, owner: str) -> None:
        """The same memory, now for another use."""
        self.pages.assign(state.pages, use, owner)
        self.slots.assign(state.slot, use, owner)

    def give_back(self, state: StateHolding) -> None:
        """Free, now or when no step in flight can write to it any more."""
        if self._launched > self._collected:
            self._fenced.append((self._launched, state))
        else:
            self._free(state)

    def _free(self, state: StateHolding) -> None:
        self.pages.give_back(state.pages)
        self.slots.give_back(state.slot)

    def check_integrity(self, states: Iterable[StateHolding]) -> None:
        """Audit against every state known to be in use. Raises PoolCorrupted."""
        states = [*states, *(state for _, state in self._fenced)]
        self.pages.check_integrity(state.pages for state in states)
        self.slots.check_integrity(state.slot for state in states)
