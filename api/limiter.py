"""How many requests may generate at one time."""

from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import Overloaded


class Limiter:
    """A bound without a queue: waiting is the engine's business, refusing early is this one's."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Raises Overloaded when `limit` requests are active."""
        if self.active >= self.limit:
            raise Overloaded(f"The server is busy: {self.active} requests are being answered. Try again later.")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
