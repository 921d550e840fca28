"""Calls that may block for long run in daemon threads: one that hangs must not keep the process from ending."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class DaemonThreads:
    """Counts the calls under way, so that what they use is not destroyed under them."""

    def __init__(self) -> None:
        self.active = 0

    def run(self, call: Callable[[], T], name: str) -> "asyncio.Future[T]":
        """The result of `call()`, as a future of the running loop. Cancelling it does not stop the thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self.active += 1

        def settle(result: T | None, error: BaseException | None) -> None:
            self.active -= 1
            if future.done():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def work() -> None:
            result: T | None = None
            error: BaseException | None = None
            try:
                result = call()
            except BaseException as caught:  # crosses to the loop, which raises it where the call is awaited
                error = caught
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=work, name=name, daemon=True).start()
        return future
