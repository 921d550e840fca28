"""Where an answer goes. Dispatch writes to this and knows neither aiohttp nor sockets."""

from typing import Protocol

Headers = list[tuple[str, str]]


class ClientGone(Exception):
    """The client closed its connection; nobody reads what is written."""


class Sink(Protocol):
    """The response to one client. Every method raises ClientGone once the client is gone."""

    @property
    def status(self) -> int:
        """The status that was, or is about to be, sent; 0 before."""
        ...

    @property
    def started(self) -> bool:
        """Whether the status line is out: from then on an error can only be an event in the stream."""
        ...

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole response at once."""

    async def start(self, status: int, headers: Headers) -> None:
        """Status and headers of a streamed response."""

    async def write(self, data: bytes) -> None:
        """More of the body. Waits while the client reads too slowly."""

    async def finish(self) -> None:
        """The end of a streamed body."""

    def write_now(self, data: bytes) -> bool:
        """As `write`, of a started sink, without waiting and without raising.

        False, and nothing is written, if the client reads too slowly, is gone, or this sink cannot do it: use `write`.
        """
        ...

    def write_chunk(self, data: bytes) -> bool:
        """As `write_now`, of a piece of body that is framed already: one chunk of HTTP/1.1 (RFC 9112, 7.1)."""
        ...

    def break_off(self) -> None:
        """End the connection without ending the body, so that the client cannot take it for whole."""


class MemorySink:
    """Keeps the answer: for requests the router makes itself."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.body = b""

    @property
    def started(self) -> bool:
        return self.status != 0

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    async def start(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    async def write(self, data: bytes) -> None:
        self.body += data

    async def finish(self) -> None:
        pass

    def write_now(self, data: bytes) -> bool:
        self.body += data
        return True

    def write_chunk(self, data: bytes) -> bool:
        return False

    def break_off(self) -> None:
        pass
