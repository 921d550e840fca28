"""A child process as an object with start, wait and stop; whoever waits for it also waits for its death."""

import asyncio
import gc
import logging
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any, TypeVar

from runtime.errors import ProcessDied

log = logging.getLogger(__name__)
T = TypeVar("T")


def ignore_terminal_signals() -> None:
    """Called first in a child: Ctrl-C reaches the whole foreground group, but the parent decides when what stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def calm_garbage_collector(thresholds: tuple[int, int, int] = (50_000, 20, 50)) -> None:
    """Called when everything is loaded: leave that out of all collections, and collect seldom.

    Steps and streams make thousands of objects that reference counts free at once; looking through them and through a
    vocabulary for cycles would stall everything for milliseconds, in the worst case a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds)


class ChildProcess:
    """One spawned process, stopped in three steps: asked, given time, killed. Lives on the event loop of its parent."""

    def __init__(self, name: str, target: Callable[..., None], *args: Any) -> None:
        # Spawn: the transfer engine and torch's thread pools do not survive a fork.
        self._process = multiprocessing.get_context("spawn").Process(target=target, args=args, name=name, daemon=False)
        self._died: asyncio.Future[int] | None = None
        self.name = name

    def start(self) -> None:
        """Start it. Must be called on a running event loop."""
        self._process.start()
        loop = asyncio.get_running_loop()
        self._died = loop.create_future()
        loop.add_reader(self._process.sentinel, self._on_death)

    def _on_death(self) -> None:
        assert self._died is not None
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.join()
        if not self._died.done():
            self._died.set_result(self._process.exitcode or 0)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._died is not None and not self._died.done()

    async def died(self) -> int:
        """Wait for its end; returns the exit code (negative: killed by that signal)."""
        assert self._died is not None
        return await asyncio.shield(self._died)

    async def until(self, ready: "asyncio.Future[T]", deadline_s: float) -> T:
        """Wait for `ready`, but not longer than the process lives or `deadline_s`. Raises ProcessDied."""
        assert self._died is not None
        waiting: set[asyncio.Future[Any]] = {ready, self._died}
        done, _ = await asyncio.wait(waiting, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if ready in done:
            return ready.result()
        if self._died in done:
            raise ProcessDied(f"{self.name} ended with exit code {self._died.result()} before it was ready")
        raise ProcessDied(f"{self.name} was not ready after {deadline_s:g} s")

    async def stop(self, grace_s: float) -> None:
        """Wait up to `grace_s` for an end already asked for, then terminate, then kill."""
        if self._died is None:
            return
        for step in (None, self._process.terminate, self._process.kill):
            if step is not None and self.alive:
                log.warning("%s (pid %d) is still there: %s", self.name, self.pid, step.__name__)
                step()
            try:
                async with asyncio.timeout(grace_s if step is None else 3.0):
                    await self.died()
                return
            except TimeoutError:
                continue
        raise ProcessDied(f"{self.name} (pid {self.pid}) cannot be killed")
