"""Runs one record of the machine: feeds it events, carries out its actions, keeps the timers its state implies."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kv_transfer.events import Receiving, Sending, Timer
from kv_transfer.machine import advance, timers

R = TypeVar("R", Sending, Receiving)


class Driver(Generic[R]):
    """`perform(action)` may feed further events: they wait until the current one's actions are done."""

    def __init__(
        self,
        record: R,
        perform: Callable[[Any], None],
        duration_s: Callable[[Timer], float],
        on_timer: Callable[[Timer], None],
    ) -> None:
        self.record: R = record
        self._perform = perform
        self._duration_s = duration_s
        self._on_timer = on_timer
        self._loop = asyncio.get_running_loop()
        self._events: deque[Any] = deque()
        self._busy = False
        self._due: dict[Timer, float] = {}
        self._handles: dict[Timer, asyncio.TimerHandle] = {}

    def feed(self, event: Any) -> None:
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                self.record, actions = advance(self.record, self._events.popleft())
                for action in actions:
                    self._perform(action)
        finally:
            self._busy = False
            self._sync()

    def restart(self, timer: Timer, due: float | None = None) -> None:
        """Let a timer run its whole duration from now, or until `due` (loop time). No effect if it does not run."""
        self._due[timer] = self._loop.time() + self._duration_s(timer) if due is None else due

    def check_integrity(self, name: str) -> None:
        """Raises AssertionError unless exactly the timers run that the record implies."""
        wanted, running = timers(self.record), self._handles.keys()
        assert running == wanted, f"{name} in {self.record.phase.name}: timers {set(running)} run, {set(wanted)} should"

    def _sync(self) -> None:
        wanted = timers(self.record)
        for timer in self._handles.keys() - wanted:
            self._handles.pop(timer).cancel()
        for timer in wanted - self._handles.keys():
            due = self._due.get(timer)
            if due is None:
                self.restart(timer)
                due = self._due[timer]
            self._handles[timer] = self._loop.call_at(due, self._fire, timer)
        for timer in self._due.keys() - wanted:
            del self._due[timer]

    def _fire(self, timer: Timer) -> None:
        """A restarted timer only moved its due time: wait for the rest."""
        if self._loop.time() < self._due[timer]:
            self._handles[timer] = self._loop.call_at(self._due[timer], self._fire, timer)
            return
        del self._handles[timer], self._due[timer]
        self._on_timer(timer)
        self._sync()
