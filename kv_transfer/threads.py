"""What the transfer wants of threads.

Calls that may block for long run in daemon threads: one that hangs must not keep the process from ending.
"""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_PR_SET_TIMERSLACK = 29
_SLACK_NS = 1_000


def sleep_precisely() -> None:
    """Let the calling thread's pauses end when they are due. Linux lets a thread sleep up to 50 us longer, so that it
    can end the pauses of several together."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)


def run_in_thread(call: Callable[[], T], name: str) -> "asyncio.Future[T]":
    """The result of `call()`, as a future of the running loop. Cancelling it does not stop the thread."""
    work, future = _prepare(call)
    threading.Thread(target=work, name=name, daemon=True).start()
    return future


class SteadyThread:
    """Runs calls one after the other, like `run_in_thread`, and lives on after them until it is closed.

    For libraries that keep things per thread and destroy them with it while others still use them.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def run(self, call: Callable[[], T]) -> "asyncio.Future[T]":
        work, future = _prepare(call)
        self._calls.put(work)
        return future

    def close(self) -> None:
        """Let the thread end after the calls made so far. Does not wait."""
        self._calls.put(None)

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            work()


def _prepare(call: Callable[[], T]) -> "tuple[Callable[[], None], asyncio.Future[T]]":
    """What a thread is to run, and the future of the running loop that it settles."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
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

    return work, future
