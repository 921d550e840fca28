"""What a message of the engine sets off, done in one go after all of it has been taken in."""

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Turn:
    """Calls listeners in the next turn of the event loop, each once however often it is asked for.

    One message brings tokens of hundreds of streams: a handle of the event loop for each would cost more than reading
    them. And a loop that is late finds several messages: then each stream writes all of its tokens at once.
    """

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due: dict[Callable[[], None], None] = {}

    def soon(self, listener: Callable[[], None]) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._run)
        self._due[listener] = None

    def _run(self) -> None:
        due, self._due = self._due, {}
        for listener in due:
            try:
                listener()
            except Exception:
                log.exception("a listener failed")
