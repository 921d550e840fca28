"""The states of this rank that transfers read or write: who they belong to, and when they are free again.

The engine decides, this book remembers. Pages and a slot are lent to a transfer and come back exactly once:

    sending     being computed for another rank; the request owns them, full pages may already be read
    lent        computed (held) or given up (cancelled); back on `SendEnded`
    receiving   being fetched; back to the request on `Received`
    quarantine  no longer wanted or failed; back on `Quiet`, or on a `Received` that was under way
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from engine.connector import (
    Connector,
    ConnectorEvent,
    EpochRenewed,
    FirstToken,
    NoConnector,
    Quiet,
    Received,
    ReceiveFailed,
    SendEnded,
)
from engine.pool import Use
from engine.pools import StateHolding, StatePools
from engine.request import Phase, Request
from runtime.errors import RequestError
from runtime.requests import ReceiveState

_MAX_ID_CHARS = 256
_REMEMBERED = 4096
"""Released transfer ids that are remembered, for legs that arrive after their release."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """The request owns its pages and slot again, and they hold its prompt."""

    request: Request
    event: Received


@dataclass(frozen=True, slots=True)
class Missing:
    """The request owns nothing; its state will not come."""

    request: Request
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Unwanted:
    """Nobody will fetch what this request is still computing. It owns its pages and slot."""

    request: Request
    outcome: str


Outcome = Arrived | Missing | Unwanted | EpochRenewed


@dataclass(slots=True)
class _Lent:
    request: Request | None
    """Set while the state is good: HELD. None after a cancel or in quarantine."""
    state: StateHolding


@dataclass(slots=True)
class TransferCounters:
    """Since the start of the process."""

    sent: int = 0
    received: int = 0
    failed: int = 0
    bytes_received: int = 0
    tokens_asked_for: int = 0
    tokens_received: int = 0


class Transfers:
    """Owner of everything that is lent. All calls from the step thread."""

    def __init__(self, connector: Connector | NoConnector, pools: StatePools) -> None:
        self._poll = connector.poll
        self._release = connector.release
        self._connector = None if isinstance(connector, NoConnector) else connector
        self._pools = pools
        self._waiting: dict[str, Request] = {}
        self._sending: dict[str, Request] = {}
        self._lent: dict[str, _Lent] = {}
        self._receiving: dict[str, Request] = {}
        self._quarantine: dict[str, _Lent] = {}
        self._released: OrderedDict[str, None] = OrderedDict()
        self.counters = TransferCounters()

    @property
    def num_sends(self) -> int:
        """States computed or kept for others."""
        return len(self._sending) + len(self._lent)

    @property
    def num_held(self) -> int:
        return len(self._lent)

    @property
    def receiving(self) -> list[Request]:
        return list(self._receiving.values())

    @property
    def num_receiving(self) -> int:
        return len(self._receiving)

    @property
    def is_empty(self) -> bool:
        """Nothing is promised, lent or in quarantine."""
        return not (self._waiting or self._sending or self._lent or self._receiving or self._quarantine)

    def states(self) -> Iterator[StateHolding]:
        """Everything that no request owns; for the audit."""
        for lent in (*self._lent.values(), *self._quarantine.values()):
            yield lent.state

    # A request's way in

    def expect(self, request: Request) -> None:
        """A request with a hand-off was submitted. Raises RequestError if it cannot be served here."""
        transfer_id = _transfer_id(request)
        if self._connector is None:
            raise RequestError("this rank takes part in no transfers", param="kv_transfer_params")
        if not 0 < len(transfer_id) <= _MAX_ID_CHARS:
            raise RequestError(
                f"a transfer id of {len(transfer_id)} characters: 1..{_MAX_ID_CHARS} are allowed",
                param="kv_transfer_params",
            )
        if transfer_id in self._released:
            raise RequestError(f"transfer {transfer_id} was released before its request came", code="released")
        if any(transfer_id in book for book in self._books()):
            raise RequestError(f"transfer {transfer_id} is already in use on this rank", param="kv_transfer_params")
        self._waiting[transfer_id] = request

    def open_send(self, request: Request) -> None:
        """The request was admitted and owns all its pages and its slot."""
        transfer_id = _transfer_id(request)
        self._sending[transfer_id] = self._waiting.pop(transfer_id)
        self._required.open_send(transfer_id, request.tokens(0, request.num_tokens).tolist())

    def announce(self, request: Request, num_written: int) -> None:
        """Tell a claimant about the pages that are full now that the first `num_written` tokens are in the state."""
        num_full = num_written // self._pools.pages.page_tokens
        final = request.owned.page_ids[request.num_announced : num_full]
        if final:
            self._required.pages_final(_transfer_id(request), final)
            request.num_announced = num_full

    def hold(self, request: Request, first: FirstToken) -> None:
        """The prompt is done: the request's state belongs to its transfer from now on."""
        transfer_id = _transfer_id(request)
        del self._sending[transfer_id]
        remaining, slot_id = request.owned.page_ids[request.num_announced :], request.owned.slot_id
        self._lent[transfer_id] = self._take_from(request, transfer_id, Use.TRANSFER, keep=True)
        request.enter(Phase.HELD)
        self._required.send_ready(transfer_id, remaining, slot_id, first)

    def receive(self, request: Request) -> None:
        """Fetch the state of a request that owns its pages and slot; they belong to the transfer from now on."""
        handoff = request.handoff
        assert isinstance(handoff, ReceiveState), request.request_id
        del self._waiting[handoff.transfer_id]
        self._pools.assign(request.owned, Use.TRANSFER, handoff.transfer_id)
        self._receiving[handoff.transfer_id] = request
        self.counters.tokens_asked_for += request.num_prompt
        self._required.receive(
            handoff.transfer_id,
            handoff.source_address,
            handoff.source_epoch,
            request.tokens(0, request.num_tokens).tolist(),
            list(request.owned.page_ids),
            request.owned.slot_id,
        )

    # A request's way out

    def cancel(self, request: Request, reason: str) -> None:
        """The request ends before its transfer did. What it owned and a transfer may still touch stays here."""
        transfer_id = _transfer_id(request)
        if self._waiting.pop(transfer_id, None) is not None:
            if not isinstance(request.handoff, ReceiveState):
                self._release(transfer_id)
        elif self._sending.pop(transfer_id, None) is not None:
            self._lent[transfer_id] = self._take_from(request, transfer_id, Use.TRANSFER)
            self._required.cancel_send(transfer_id, reason)
        elif self._receiving.pop(transfer_id, None) is not None:
            self._quarantine[transfer_id] = self._take_from(request, transfer_id, Use.QUARANTINE)
            self._required.cancel_receive(transfer_id)

    def release(self, transfer_id: str) -> Request | None:
        """The router gave the transfer up. Returns the request if it was still waiting: it must be failed."""
        if not 0 < len(transfer_id) <= _MAX_ID_CHARS:
            return None
        self._released[transfer_id] = None
        if len(self._released) > _REMEMBERED:
            self._released.popitem(last=False)
        self._release(transfer_id)
        return self._waiting.pop(transfer_id, None)

    # What the transfer says

    def poll(self) -> list[Outcome]:
        """What happened since the last step, as far as requests are concerned; lent memory is already given back."""
        outcomes = [self._handle(event) for event in self._poll()]
        return [outcome for outcome in outcomes if outcome is not None]

    def _handle(self, event: ConnectorEvent) -> Outcome | None:
        match event:
            case SendEnded():
                return self._send_ended(event)
            case Received():
                return self._received(event)
            case ReceiveFailed():
                return self._receive_failed(event.transfer_id, event.message, event.retryable)
            case Quiet():
                return self._quiet(event.transfer_id)
            case EpochRenewed():
                return event

    def _send_ended(self, event: SendEnded) -> Outcome | None:
        self.counters.sent += event.outcome == "fetched"
        request = self._sending.pop(event.transfer_id, None)
        if request is not None:
            return Unwanted(request, event.outcome)
        lent = self._lent.pop(event.transfer_id, None)
        if lent is not None:
            if lent.request is not None:
                lent.request.enter(Phase.DONE)
            self._pools.give_back(lent.state)
        return None

    def _received(self, event: Received) -> Outcome | None:
        request = self._receiving.pop(event.transfer_id, None)
        if request is None:
            return self._quiet(event.transfer_id)
        self._pools.assign(request.owned, Use.REQUEST, request.request_id)
        request.handoff = None
        self.counters.received += 1
        self.counters.bytes_received += event.num_bytes
        self.counters.tokens_received += request.num_prompt
        return Arrived(request, event)

    def _receive_failed(self, transfer_id: str, message: str, retryable: bool) -> Outcome | None:
        request = self._receiving.pop(transfer_id, None)
        if request is None:
            return None
        self._quarantine[transfer_id] = self._take_from(request, transfer_id, Use.QUARANTINE)
        request.handoff = None
        self.counters.failed += 1
        return Missing(request, message, retryable)

    def _quiet(self, transfer_id: str) -> Outcome | None:
        lost = self._receive_failed(transfer_id, f"transfer {transfer_id} ended without a state", retryable=True)
        lent = self._quarantine.pop(transfer_id, None)
        if lent is not None:
            self._pools.give_back(lent.state)
        return lost

    def _take_from(self, request: Request, transfer_id: str, use: Use, keep: bool = False) -> _Lent:
        lent = _Lent(request if keep else None, request.owned)
        request.state = None
        self._pools.assign(lent.state, use, transfer_id)
        return lent

    @property
    def _required(self) -> Connector:
        assert self._connector is not None
        return self._connector

    def _books(self) -> tuple[dict[str, Request] | dict[str, _Lent], ...]:
        return self._waiting, self._sending, self._lent, self._receiving, self._quarantine


def _transfer_id(request: Request) -> str:
    assert request.handoff is not None, request.request_id
    return request.handoff.transfer_id
