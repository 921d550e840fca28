"""Running an asyncio process: uvloop, one task group, and signals that end it."""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Stop(Exception):
    """Raised inside the task group of a process to end it in an orderly way."""


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `main(stopping)` to its end. The first SIGTERM or SIGINT sets `stopping`; the second ends the process."""
    import uvloop

    async def supervised() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def on_signal(number: int) -> None:
            name = signal.Signals(number).name
            if stopping.is_set():
                log.warning("%s again: stopping at once", name)
                task.cancel()
            else:
                log.info("%s: stopping", name)
                stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        await main(stopping)

    uvloop.run(supervised())
