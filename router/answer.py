"""What came back on one leg, and what it means: still waiting, good, refused, or failed."""

import enum

import orjson

from router.exchange import ConnectionBroken
from router.http1 import ResponseHead
from router.legs import Leg
from router.recovery import Failure

KEEP_ALIVE = b": keep-alive\n\n"
"""What a node sends on a stream that has no token yet."""
_ERROR_STARTS = (b'data: {"error"', b"event: error")


class Verdict(enum.Enum):
    WAITING = "waiting"
    KEEP_ALIVE = "keep_alive"
    """The stream is open and has no token yet."""
    GOOD = "good"
    """A stream: its first events are here. Otherwise: all of it is here."""
    REFUSED = "refused"
    """A 4xx, complete: the client's own mistake."""
    FAILED = "failed"


class Answer:
    """The response on one leg until the client may have it. After GOOD, more of a stream comes from the exchange."""

    __slots__ = ("_data", "_held", "failure", "leg", "streamed")

    def __init__(self, leg: Leg) -> None:
        self.leg = leg
        self._data = b""
        self._held = b""
        """Events that open a stream without a token in it: kept back, so that another node may still answer."""
        self.streamed = False
        """It is a stream of events."""
        self.failure: Failure | None = None

    @property
    def head(self) -> ResponseHead:
        assert self.leg.exchange.head is not None
        return self.leg.exchange.head

    @property
    def data(self) -> bytes:
        """The body so far; of a stream, its first events without keep-alive comments."""
        return self._held + self._data if self._held else self._data

    def look(self) -> Verdict:
        """Judge what is here now. Call again after every change until it is not WAITING or KEEP_ALIVE."""
        exchange = self.leg.exchange
        if exchange.error is not None:
            self.failure = Failure(self.leg.kind, self.leg.target.name, error=exchange.error)
            return Verdict.FAILED
        if exchange.head is None:
            return Verdict.WAITING
        arrived = exchange.take()
        if arrived:
            self._data = self._data + arrived if self._data else arrived
        status = exchange.head.status
        if status // 100 == 2 and is_event_stream(exchange.head):
            self.streamed = True
            return self._look_at_events()
        if not exchange.complete:
            return Verdict.WAITING
        if status // 100 == 2:
            return Verdict.GOOD
        if status // 100 == 4:
            return Verdict.REFUSED
        return self._failed(status)

    def _look_at_events(self) -> Verdict:
        data = self._data
        if data.endswith(KEEP_ALIVE):
            self._held += data.replace(KEEP_ALIVE, b"")
            self._data = b""
            return Verdict.KEEP_ALIVE
        complete = self.leg.exchange.complete
        if b"\n\n" not in data and b"\r\n\r\n" not in data and not complete:
            return Verdict.WAITING
        if not data:
            error = ConnectionBroken(f"{self.leg.target.name} ended its stream before the first event")
            self.failure = Failure(self.leg.kind, self.leg.target.name, error=error)
            return Verdict.FAILED
        status = _error_status(data)
        return Verdict.GOOD if status is None or status < 500 else self._failed(status)

    def _failed(self, status: int) -> Verdict:
        retry_after = self.head.get(b"retry-after")
        self.failure = Failure(
            self.leg.kind,
            self.leg.target.name,
            status=status,
            retry_after=retry_after.decode("latin-1") if retry_after else None,
        )
        return Verdict.FAILED


def is_event_stream(head: ResponseHead) -> bool:
    content_type = head.get(b"content-type")
    return content_type is not None and content_type.startswith(b"text/event-stream")


def _error_status(data: bytes) -> int | None:
    """The HTTP status that the last of these events stands for, if it is an error."""
    if not any(start in data for start in _ERROR_STARTS):
        return None
    for line in data.splitlines():
        if not line.startswith(b"data: {"):
            continue
        try:
            error = orjson.loads(line[6:]).get("error")
        except orjson.JSONDecodeError:
            continue
        if isinstance(error, dict):
            code = error.get("code")
            # A code that is a word, or none at all, is how a server says that it failed by itself.
            return code if isinstance(code, int) else 500
    return None


class WholeEvents:
    """Cuts a stream so that only whole events go out: one that breaks off never leaves half an event behind."""

    __slots__ = ("_tail",)

    MAX_TAIL_BYTES = 1 << 20

    def __init__(self) -> None:
        self._tail = b""

    @property
    def empty(self) -> bool:
        """Nothing is held back."""
        return not self._tail

    def cut(self, data: bytes) -> bytes:
        """What may go out now."""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            return data
        end = 0
        for terminator in (b"\n\n", b"\r\n\r\n"):
            at = data.rfind(terminator)
            if at >= 0:
                end = max(end, at + len(terminator))
        if len(data) - end > self.MAX_TAIL_BYTES:
            return data
        self._tail = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """What never became a whole event."""
        tail, self._tail = self._tail, b""
        return tail
