"""The two requests that one request becomes: what is sent to the prefill rank and to the decode rank."""

from collections.abc import Callable
from typing import Literal

from api.resume import ASK_HEADER
from router.bodies import Body, decode_body, prefill_body
from router.config import DeadlineConfig
from router.exchange import Exchange
from router.registry import Target
from router.request import Request
from router.transfers import Transfer
from router.upstream import Upstream

ASK_NOTES = f"{ASK_HEADER.lower()}: 1\r\n"
FORWARDED_HEADERS = ("authorization", "x-api-key", "traceparent", "tracestate", "anthropic-version", "anthropic-beta")
"""What a client's request carries over to both nodes besides its body and id."""


class Leg:
    """One exchange with one rank, counted on both while it runs."""

    __slots__ = ("_gap_s", "_lost_gap_s", "exchange", "kind", "lost", "request_tokens", "streaming", "target")

    def __init__(
        self,
        kind: Literal["prefill", "decode"],
        target: Target,
        exchange: Exchange,
        request_tokens: int,
        deadlines: DeadlineConfig,
    ) -> None:
        self.kind = kind
        self.target = target
        self.exchange = exchange
        self.streaming = False
        """The client has some of this answer already."""
        self.lost: str | None = None
        self._gap_s = deadlines.idle_gap_s
        self._lost_gap_s = deadlines.lost_gap_s
        target.in_flight += 1
        target.fresh_requests += 1
        target.fresh_tokens += request_tokens
        target.node.calls.add(self)

    def node_lost(self, reason: str) -> None:
        """Before the first byte the leg fails now. A stream that still flows may go on: only its gaps get short."""
        self.lost = reason
        if self.streaming:
            self.exchange.deadline_text = f"no bytes for {self._lost_gap_s:g} s in mid-answer, and no heartbeat"
            self.expect_more(self.exchange.heard_at)
        else:
            self.exchange.node_lost(reason)

    def begin_stream(self) -> None:
        """The client has the first bytes: from now on the gaps count."""
        self.streaming = True
        self.exchange.deadline = float("inf")
        self.exchange.deadline_text = f"no bytes for {self._gap_s:g} s in the middle of its answer"

    def expect_more(self, now: float) -> None:
        """Start the clock for the next piece of a streamed answer; every piece starts it anew."""
        self.exchange.heard_at = now
        self.exchange.max_gap_s = self._gap_s if self.lost is None else self._lost_gap_s

    def expect_nothing(self) -> None:
        """Stop that clock."""
        self.exchange.max_gap_s = float("inf")

    def close(self) -> None:
        """Stop counting it; cancel it if it still runs. Idempotent."""
        self._uncount()
        self.exchange.close()

    def let_finish(self, now: float) -> None:
        """Nobody waits for it any more, but its answer is about to come: let it, so that the connection lives on."""
        self._uncount()
        self.exchange.on_change = _ignore
        self.exchange.expire_at(now + self._lost_gap_s, "its answer came too late to matter")

    def _uncount(self) -> None:
        if self in self.target.node.calls:
            self.target.node.calls.remove(self)
            self.target.in_flight -= 1


def _ignore() -> None:
    """Nobody listens any more."""


class LegFactory:
    """Writes and starts legs."""

    def __init__(
        self,
        upstream: Upstream,
        deadlines: DeadlineConfig,
        node_api_key: str | None,
        clock: Callable[[], float],
    ) -> None:
        self._upstream = upstream
        self._deadlines = deadlines
        self._key = f"authorization: Bearer {node_api_key}\r\n" if node_api_key else ""
        self._clock = clock

    def prefill(self, request: Request, transfer: Transfer, wake: Callable[[], None]) -> Leg:
        """Ask for the prompt's state to be computed and held under the transfer's id."""
        body = prefill_body(request, transfer, transfer.prefill.node.info.dialect)
        leg = self._start("prefill", transfer.prefill, request, body, wake)
        limit_s = self._deadlines.prefill_s
        leg.exchange.expire_at(self._clock() + limit_s, f"no answer to the prefill leg within {limit_s:g} s")
        return leg

    def decode(self, request: Request, target: Target, transfer: Transfer | None, wake: Callable[[], None]) -> Leg:
        """Ask for the answer: from the state of a transfer, or computed there from the start."""
        if transfer is not None:
            transfer.decodes.append(target)
        body = decode_body(request, transfer, target.node.info.dialect)
        asks_notes = request.resumable and target.node.info.dialect == "tandem"
        leg = self._start("decode", target, request, body, wake, ASK_NOTES if asks_notes else "")
        limit_s = self._deadlines.first_byte_s
        leg.exchange.expire_at(self._clock() + limit_s, f"no byte of the answer within {limit_s:g} s")
        return leg

    def _start(
        self,
        kind: Literal["prefill", "decode"],
        target: Target,
        request: Request,
        body: Body,
        wake: Callable[[], None],
        more_headers: str = "",
    ) -> Leg:
        origin = self._upstream.origin(target.node.info.url)
        head = self._head(request, origin.name, sum(map(len, body)), target, more_headers)
        return Leg(kind, target, origin.start(head, body, wake), request.num_tokens, self._deadlines)

    def _head(self, request: Request, host: str, length: int, target: Target, more_headers: str) -> bytes:
        """The request head for one rank."""
        headers = request.headers
        forwarded = "".join(f"{name}: {headers[name]}\r\n" for name in FORWARDED_HEADERS if name in headers)
        if "authorization" not in headers:
            forwarded += self._key
        alone = target.node.info.dialect == "vllm" and len(target.node.targets) == 1
        rank = "" if alone else f"x-data-parallel-rank: {target.info.rank}\r\n"
        return (
            f"POST {request.path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"content-length: {length}\r\nx-request-id: {request.request_id}\r\n"
            f"{rank}{more_headers}{forwarded}\r\n"
        ).encode("latin-1")
