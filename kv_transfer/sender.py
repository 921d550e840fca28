"""The prefill side of an agent: one driver per transfer, claims routed to it, its answers routed to streams."""

import logging
from collections.abc import Callable
from typing import Protocol

from kv_transfer.agent_events import AgentEvent, SendEnded
from kv_transfer.checksums import StateSums
from kv_transfer.config import TransferConfig
from kv_transfer.driver import Driver
from kv_transfer.events import (
    Claimant,
    ClaimantLost,
    ClaimArrived,
    ClaimWaitOver,
    EndSend,
    FetchedArrived,
    Grant,
    HoldOver,
    LeaseLapsed,
    Opened,
    PagesFinal,
    ReleaseArrived,
    Released,
    RenewArrived,
    SendAction,
    SendCancelled,
    SendEvent,
    Sending,
    SendPhase,
    StateEnd,
    StateReady,
    TellProgress,
    TellReady,
    TellRefuse,
    Timer,
)
from kv_transfer.messages import (
    Claim,
    Fetched,
    Hello,
    Lease,
    Progress,
    Ready,
    Refuse,
    Release,
    Renew,
    ToDecode,
    ToPrefill,
)
from kv_transfer.regions import MemoryRegion, ReadBytes
from kv_transfer.remembered import Remembered
from kv_transfer.stats import TransferCounters

log = logging.getLogger(__name__)


class Conversation(Protocol):
    """A decode rank's stream, as the sender needs it."""

    hello: Hello

    def send(self, message: ToDecode) -> None:
        """Queue a message. Does nothing once the stream is over."""


class Send:
    """One transfer: its driver, its checksums, and the streams its claimants speak on."""

    def __init__(self, transfer_id: str, sums: StateSums) -> None:
        self.transfer_id = transfer_id
        self.sums = sums
        self.driver: Driver[Sending]
        self.streams: dict[Claimant, Conversation] = {}


class Sender:
    """Runs on the transfer thread. `emit` hands events to the engine."""

    def __init__(
        self,
        config: TransferConfig,
        *,
        pages: MemoryRegion,
        slots: MemoryRegion,
        read_bytes: ReadBytes,
        emit: Callable[[AgentEvent], None],
        clock: Callable[[], float],
        counters: TransferCounters,
        epoch: Callable[[], str],
    ) -> None:
        self._config = config
        self._pages = pages
        self._slots = slots
        self._read_bytes = read_bytes
        self._emit = emit
        self._counters = counters
        self._epoch = epoch
        self._sends: dict[str, Send] = {}
        self._ended: Remembered[Sending] = Remembered(clock, config.remember_s)

    # ---- from the engine --------------------------------------------------------------------------------------------

    def open(self, transfer_id: str, num_tokens: int, prompt_hash: bytes) -> None:
        self._feed(transfer_id, Opened(num_tokens, prompt_hash))

    def publish_pages(self, transfer_id: str, indices: tuple[int, ...]) -> None:
        send = self._sends.get(transfer_id)
        if send is not None:
            send.sums.add_pages(indices, last=False)
            send.driver.feed(PagesFinal(indices))

    def publish_ready(self, transfer_id: str, indices: tuple[int, ...], slot: int, payload: bytes) -> None:
        send = self._sends.get(transfer_id)
        if send is not None:
            send.sums.add_pages(indices, last=True)
            send.driver.feed(StateReady(indices, StateEnd(slot, payload, send.sums.finish(slot))))

    def cancel(self, transfer_id: str, reason: str) -> None:
        if transfer_id in self._sends:
            self._feed(transfer_id, SendCancelled(reason))

    def release(self, transfer_id: str) -> None:
        self._feed(transfer_id, Released())

    def cancel_all(self, reason: str) -> None:
        for transfer_id in list(self._sends):
            self._feed(transfer_id, SendCancelled(reason))

    # ---- from peers -------------------------------------------------------------------------------------------------

    def on_message(self, stream: Conversation, message: ToPrefill) -> None:
        assert not isinstance(message, Hello)
        claimant = Claimant(stream.hello.epoch, message.attempt)
        match message:
            case Claim():
                self._claim(stream, claimant, message)
            case Renew(ask=ask):
                self._hear(stream, claimant, message.transfer_id, RenewArrived(claimant, ask))
            case Fetched():
                self._hear(stream, claimant, message.transfer_id, FetchedArrived(claimant))
            case Release():
                self._hear(stream, claimant, message.transfer_id, ReleaseArrived(claimant))

    def on_stream_lost(self, stream: Conversation) -> None:
        for send in list(self._sends.values()):
            for claimant in [c for c, s in send.streams.items() if s is stream]:
                del send.streams[claimant]
                self._feed(send.transfer_id, ClaimantLost(claimant))

    def _claim(self, stream: Conversation, claimant: Claimant, claim: Claim) -> None:
        if claim.source_epoch not in ("", self._epoch()):
            reason = f"epoch {claim.source_epoch} is over, this rank is at {self._epoch()}"
            self._refuse(stream, claim.transfer_id, TellRefuse(claimant, reason, True))
            return
        event = ClaimArrived(claimant, claim.ask, claim.num_tokens, claim.prompt_hash)
        self._hear(stream, claimant, claim.transfer_id, event)

    def _hear(self, stream: Conversation, claimant: Claimant, transfer_id: str, event: SendEvent) -> None:
        self._feed(transfer_id, event, (claimant, stream))

    # ---- the machine ------------------------------------------------------------------------------------------------

    def _feed(self, transfer_id: str, event: SendEvent, speaker: tuple[Claimant, Conversation] | None = None) -> None:
        send = self._sends.get(transfer_id) or self._revive(transfer_id)
        if speaker is not None:
            send.streams[speaker[0]] = speaker[1]
        send.driver.feed(event)
        record = send.driver.record
        if record.phase is SendPhase.ENDED or record.phase is SendPhase.UNKNOWN:
            self._sends.pop(transfer_id, None)
            if record.phase is SendPhase.ENDED:
                self._ended.put(transfer_id, record)
            return
        concerned = record.lingering if record.claimant is None else record.lingering | {record.claimant}
        for claimant in send.streams.keys() - concerned:
            del send.streams[claimant]

    def _revive(self, transfer_id: str) -> Send:
        send = Send(transfer_id, StateSums(self._config.verify, self._pages, self._slots, self._read_bytes))
        send.driver = Driver(
            self._ended.pop(transfer_id) or Sending(),
            lambda action: self._perform(send, action),
            self._duration_s,
            lambda timer: self._time_is_up(send, timer),
        )
        self._sends[transfer_id] = send
        return send

    def _duration_s(self, timer: Timer) -> float:
        match timer.name:
            case "lease":
                return self._config.lease_s
            case "claim_wait":
                return self._config.claim_wait_s
        return self._config.hold_unclaimed_s

    def _time_is_up(self, send: Send, timer: Timer) -> None:
        log.info("transfer %s: %s ran out", send.transfer_id, timer.name)
        if timer.claimant is None:
            self._feed(send.transfer_id, HoldOver())
        elif timer.name == "claim_wait":
            self._feed(send.transfer_id, ClaimWaitOver(timer.claimant))
        else:
            self._counters.leases_lapsed += 1
            self._feed(send.transfer_id, LeaseLapsed(timer.claimant))

    def _perform(self, send: Send, action: SendAction) -> None:
        match action:
            case Grant(claimant=claimant):
                send.driver.restart(Timer("lease", claimant))
            case TellProgress():
                message = Progress(
                    transfer_id=send.transfer_id,
                    attempt=action.claimant.attempt,
                    lease=Lease(action.ask, self._config.lease_s),
                    first_page=action.first_page,
                    pages=action.pages,
                )
                self._tell(send, action.claimant, message)
            case TellReady():
                ready = Ready(
                    transfer_id=send.transfer_id,
                    attempt=action.claimant.attempt,
                    lease=Lease(action.ask, self._config.lease_s),
                    first_page=action.first_page,
                    pages=action.pages,
                    slot=action.end.slot,
                    payload=action.end.payload,
                    prompt_hash=action.prompt_hash,
                    checksums=action.end.checksums,
                )
                self._tell(send, action.claimant, ready)
            case TellRefuse(claimant=claimant):
                stream = send.streams.get(claimant)
                if stream is not None:
                    self._refuse(stream, send.transfer_id, action)
            case EndSend(outcome=outcome):
                self._counters.sends_ended[outcome] += 1
                self._emit(SendEnded(send.transfer_id, outcome))

    def _tell(self, send: Send, claimant: Claimant, message: ToDecode) -> None:
        stream = send.streams.get(claimant)
        if stream is not None:
            stream.send(message)

    def _refuse(self, stream: Conversation, transfer_id: str, action: TellRefuse) -> None:
        self._counters.claims_refused += 1
        log.info("transfer %s: claim %d refused: %s", transfer_id, action.claimant.attempt, action.reason)
        stream.send(
            Refuse(
                transfer_id=transfer_id,
                attempt=action.claimant.attempt,
                reason=action.reason,
                retryable=action.retryable,
            )
        )

    # ---- looking at it ----------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        return sum(send.driver.record.phase is not SendPhase.PARKED for send in self._sends.values())

    @property
    def open_ids(self) -> frozenset[str]:
        """Transfers the engine opened and has not got back."""
        return frozenset(t for t, s in self._sends.items() if s.driver.record.phase is not SendPhase.PARKED)

    def check_integrity(self) -> None:
        """Raises AssertionError naming a transfer whose record, timers or streams do not fit together."""
        slots: dict[int, str] = {}
        for transfer_id, send in self._sends.items():
            send.driver.check_integrity(transfer_id)
            record = send.driver.record
            if record.end is not None:
                owner = slots.setdefault(record.end.slot, transfer_id)
                assert owner == transfer_id, f"slot {record.end.slot} is sent by {owner} and {transfer_id}"
            concerned = set(record.lingering) | ({record.claimant} if record.claimant else set())
            assert send.streams.keys() <= concerned, f"{transfer_id} keeps streams of {send.streams.keys() - concerned}"
