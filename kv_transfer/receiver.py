"""The decode side of an agent: one driver per receive, its reads, its lease, its quarantine."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from itertools import count
from typing import Protocol

from kv_transfer.agent_events import AgentEvent, Quiet, Received, ReceiveFailed
from kv_transfer.checksums import first_mismatch
from kv_transfer.config import TransferConfig
from kv_transfer.driver import Driver
from kv_transfer.events import (
    Cancelled,
    Connected,
    DropReads,
    EmitFailed,
    EmitQuiet,
    EmitReceived,
    Fenced,
    PeerLost,
    ProgressArrived,
    ReadsEnded,
    ReadyArrived,
    ReceiveAction,
    ReceivePhase,
    Receiving,
    RefuseArrived,
    Released,
    Requested,
    SendClaim,
    SendFetched,
    SendRelease,
    StartReads,
    StartVerify,
    TimedOut,
    Timer,
    Verified,
)
from kv_transfer.lease import ReaderLease
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
from kv_transfer.pieces import plan_records
from kv_transfer.quarantine import Quarantine
from kv_transfer.reader import Reader, ReadGroup
from kv_transfer.regions import MemoryRegion, ReadBytes
from kv_transfer.remembered import Remembered
from kv_transfer.stats import TransferCounters

log = logging.getLogger(__name__)

_CLAIMED = (ReceivePhase.CLAIMING, ReceivePhase.READING, ReceivePhase.VERIFYING)


class Link(Protocol):
    """A stream to one incarnation of a prefill rank, as the receiver needs it."""

    hello: Hello | None
    """The peer's, once it introduced itself."""
    is_open: bool
    """Claims can be sent."""

    def send(self, message: ToPrefill) -> None:
        """Queue a message. Does nothing once the stream is over."""


class Receive:
    """One claim of one transfer."""

    def __init__(
        self,
        transfer_id: str,
        attempt: int,
        pages: tuple[int, ...],
        slot: int,
        claim: tuple[str, int, bytes],
        lease: ReaderLease,
    ) -> None:
        self.transfer_id = transfer_id
        self.attempt = attempt
        self.pages = pages
        self.slot = slot
        self.source_epoch, self.num_tokens, self.prompt_hash = claim
        self.lease = lease
        self.link: Link | None = None
        self.driver: Driver[Receiving]
        self.groups: set[ReadGroup] = set()
        self.ready: Ready | None = None
        self.claimed_at = 0.0
        self.ready_at = 0.0
        self.first_read_at: float | None = None
        self.last_read_at = 0.0
        self.progress_at = 0.0
        self.num_bytes = 0


class Receiver:
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
        spawn: Callable[..., object],
        link_to: Callable[[str, str], Link],
    ) -> None:
        self._config = config
        self._pages = pages
        self._slots = slots
        self._read_bytes = read_bytes
        self._emit = emit
        self._clock = clock
        self._counters = counters
        self._spawn = spawn
        self._link_to = link_to
        self.reader: Reader
        self.quarantine = Quarantine(clock)
        self._receives: dict[str, Receive] = {}
        self._released: Remembered[bool] = Remembered(clock, config.remember_s)
        self._attempts = count(1)

    # ---- from the engine --------------------------------------------------------------------------------------------

    def open(
        self,
        transfer_id: str,
        source_address: str,
        source_epoch: str,
        num_tokens: int,
        prompt_hash: bytes,
        pages: tuple[int, ...],
        slot: int,
    ) -> None:
        lease = ReaderLease(self._config.lease_margin_s, self._config.lease_s)  # replaced when the peer is known
        claim = (source_epoch, num_tokens, prompt_hash)
        receive = Receive(transfer_id, next(self._attempts), pages, slot, claim, lease)
        receive.driver = Driver(
            Receiving(),
            lambda action: self._perform(receive, action),
            self._duration_s,
            lambda timer: self._time_is_up(receive, timer),
        )
        self._receives[transfer_id] = receive
        receive.driver.feed(Requested(len(pages)))
        if self._released.pop(transfer_id):
            self._feed(receive, Released())
            return
        receive.link = self._link_to(source_address, source_epoch)
        if receive.link.is_open:
            self._feed(receive, Connected())

    def cancel(self, transfer_id: str) -> None:
        receive = self._receives.get(transfer_id)
        if receive is not None:
            self._feed(receive, Cancelled())

    def release(self, transfer_id: str) -> None:
        receive = self._receives.get(transfer_id)
        if receive is None:
            self._released.put(transfer_id, True)
        else:
            self._feed(receive, Released())

    def cancel_all(self) -> None:
        for receive in list(self._receives.values()):
            self._feed(receive, Cancelled())

    def fence(self) -> None:
        """The transfer engine is gone, and with it every read."""
        for receive in list(self._receives.values()):
            receive.groups.clear()
            self._feed(receive, Fenced())

    # ---- from peers -------------------------------------------------------------------------------------------------

    def on_link_open(self, link: Link) -> None:
        for receive in self._of(link):
            self._feed(receive, Connected())

    def on_link_refused(self, link: Link, reason: str, retryable: bool) -> None:
        """The two sides cannot work together, or the peer is another incarnation than the one asked for."""
        for receive in self._of(link):
            self._feed(receive, RefuseArrived(reason, retryable))

    def on_link_lost(self, link: Link, reason: str) -> None:
        for receive in self._of(link):
            self._feed(receive, PeerLost(reason))

    def on_message(self, link: Link, message: ToDecode) -> None:
        assert not isinstance(message, Hello)
        receive = self._receives.get(message.transfer_id)
        if receive is None or receive.attempt != message.attempt or receive.link is not link:
            return
        match message:
            case Progress(lease=lease, first_page=first, pages=pages):
                self._granted(receive, lease)
                if self._addressable(receive, link, pages):
                    self._feed(receive, ProgressArrived(first, pages))
            case Ready():
                self._granted(receive, message.lease)
                if message.prompt_hash != receive.prompt_hash:
                    reason = (
                        f"prompt hashes differ: {message.prompt_hash.hex()} there, {receive.prompt_hash.hex()} here"
                    )
                    self._feed(receive, RefuseArrived(reason, False))
                elif self._addressable(receive, link, message.pages, message.slot):
                    if receive.ready is None:
                        receive.ready = message
                        receive.ready_at = self._clock()
                    self._feed(receive, ReadyArrived(message.first_page, message.pages))
            case Refuse(reason=reason, retryable=retryable):
                self._feed(receive, RefuseArrived(reason, retryable))

    def renew(self) -> None:
        """Tell prefill ranks that we are still reading, where it is time."""
        now = self._clock()
        for receive in self._receives.values():
            if receive.driver.record.phase in _CLAIMED and receive.lease.should_renew(now):
                ask = receive.lease.ask(now)
                self._tell(receive, Renew(transfer_id=receive.transfer_id, attempt=receive.attempt, ask=ask))

    def _of(self, link: Link) -> list[Receive]:
        return [receive for receive in self._receives.values() if receive.link is link]

    def _granted(self, receive: Receive, lease: Lease) -> None:
        receive.lease.grant(lease.ask, lease.seconds)
        if receive.lease.end is not None:
            receive.driver.restart(Timer("lease"), due=receive.lease.end)

    def _addressable(self, receive: Receive, link: Link, pages: Iterable[int], slot: int = 0) -> bool:
        """Whether the records exist in the peer's regions; otherwise the receive has failed."""
        assert link.hello is not None
        last, count = max(pages, default=-1), link.hello.pages.count
        if last < count and slot < link.hello.slots.count:
            return True
        what = f"page {last} of {count}" if last >= count else f"slot {slot} of {link.hello.slots.count}"
        self._feed(receive, RefuseArrived(f"the peer announced {what}", False))
        return False

    # ---- the machine ------------------------------------------------------------------------------------------------

    def _feed(self, receive: Receive, event: object) -> None:
        receive.driver.feed(event)
        phase = receive.driver.record.phase
        if phase is ReceivePhase.DRAINING and receive.transfer_id not in self.quarantine:
            self.quarantine.enter(receive.transfer_id, receive.pages, receive.slot)
        if phase is ReceivePhase.ENDED:
            if receive.transfer_id in self.quarantine:
                held_s = self.quarantine.leave(receive.transfer_id)
                log.info("transfer %s: quiet after %.3f s in quarantine", receive.transfer_id, held_s)
            if self._receives.get(receive.transfer_id) is receive:
                del self._receives[receive.transfer_id]

    def _duration_s(self, timer: Timer) -> float:
        match timer.name:
            case "connect":
                return 2 * self._config.connect_timeout_s + self._config.peer_backoff_s
            case "ready":
                return self._config.prefill_deadline_s
            case "lease":
                return self._config.lease_s
        return self._config.read_deadline_s

    def _time_is_up(self, receive: Receive, timer: Timer) -> None:
        after_s = self._duration_s(timer)
        match timer.name:
            case "stall":
                due = after_s + max(receive.progress_at, *(group.progress or 0.0 for group in receive.groups))
                if due > self._clock():
                    receive.driver.restart(timer, due=due)
                    return
                reason = f"no read ended for {after_s} s"
            case "lease":
                reason = "the lease ran out"
            case "ready":
                reason = f"prefill was not done {after_s} s after the claim"
            case _:
                reason = f"no connection to the prefill rank within {after_s} s"
        self._feed(receive, TimedOut(reason))

    def _perform(self, receive: Receive, action: ReceiveAction) -> None:
        match action:
            case SendClaim():
                self._claim(receive)
            case StartReads():
                self._start_reads(receive, action)
            case DropReads():
                for group in receive.groups:
                    group.drop()
            case StartVerify():
                self._verify(receive)
            case SendFetched():
                # The engine's thread, which was just woken, needs the interpreter first.
                fetched = Fetched(transfer_id=receive.transfer_id, attempt=receive.attempt)
                asyncio.get_running_loop().call_soon(self._tell, receive, fetched)
            case SendRelease(reason=reason):
                self._tell(receive, Release(transfer_id=receive.transfer_id, attempt=receive.attempt, reason=reason))
            case EmitReceived():
                self._received(receive)
            case EmitFailed(reason=reason, retryable=retryable):
                self._counters.receives_failed += 1
                log.warning("transfer %s: not received: %s", receive.transfer_id, reason)
                self._emit(ReceiveFailed(receive.transfer_id, f"transfer {receive.transfer_id}: {reason}", retryable))
            case EmitQuiet():
                self._emit(Quiet(receive.transfer_id))

    def _claim(self, receive: Receive) -> None:
        assert receive.link is not None
        assert receive.link.hello is not None
        receive.lease = ReaderLease(self._config.lease_margin_s, receive.link.hello.lease_s)
        receive.claimed_at = self._clock()
        claim = Claim(
            transfer_id=receive.transfer_id,
            attempt=receive.attempt,
            ask=receive.lease.ask(receive.claimed_at),
            source_epoch=receive.source_epoch,
            num_tokens=receive.num_tokens,
            prompt_hash=receive.prompt_hash,
        )
        self._tell(receive, claim)

    def _tell(self, receive: Receive, message: ToPrefill) -> None:
        if receive.link is not None:
            receive.link.send(message)

    def _start_reads(self, receive: Receive, action: StartReads) -> None:
        assert receive.link is not None
        peer = receive.link.hello
        assert peer is not None
        mine = receive.pages[action.first_page : action.first_page + len(action.pages)]
        runs = plan_records(self._pages, mine, peer.pages, action.pages)
        if action.with_slot:
            assert receive.ready is not None
            runs += plan_records(self._slots, (receive.slot,), peer.slots, (receive.ready.slot,))
        limit = self._config.read_bytes_limit
        group = ReadGroup(peer.session_id, runs, limit, lambda group: self._reads_ended(receive, group))
        receive.groups.add(group)
        receive.progress_at = self._clock()
        self.reader.start(group)

    def _reads_ended(self, receive: Receive, group: ReadGroup) -> None:
        if group not in receive.groups:
            return
        receive.groups.discard(group)
        now = self._clock()
        receive.last_read_at = receive.progress_at = now
        receive.num_bytes += group.num_bytes
        if group.started is not None:
            started = receive.first_read_at
            receive.first_read_at = group.started if started is None else min(started, group.started)
        ended = ReadsEnded(group.failure is None, receive.lease.covers(now), group.failure or "")
        self._feed(receive, ended)

    def _verify(self, receive: Receive) -> None:
        assert receive.ready is not None
        told = receive.ready.checksums
        if told.slot is None and not told.pages:
            receive.driver.feed(Verified(True))
        else:
            self._spawn(self._compare(receive), f"verify {receive.transfer_id}")

    async def _compare(self, receive: Receive) -> None:
        assert receive.ready is not None
        told = receive.ready.checksums
        reason = await first_mismatch(told, self._pages, receive.pages, self._slots, receive.slot, self._read_bytes)
        self._feed(receive, Verified(reason is None, reason or ""))

    def _received(self, receive: Receive) -> None:
        assert receive.ready is not None
        first_read_at = receive.ready_at if receive.first_read_at is None else receive.first_read_at
        event = Received(
            transfer_id=receive.transfer_id,
            payload=receive.ready.payload,
            num_bytes=receive.num_bytes,
            transfer_s=receive.last_read_at - first_read_at,
            exposed_s=receive.last_read_at - receive.ready_at,
            wait_s=receive.ready_at - receive.claimed_at,
        )
        self._counters.received += 1
        self._emit(event)
        log.debug(
            "transfer %s: received %.1f MiB in %.1f ms, %.1f ms of it after the prompt was done",
            receive.transfer_id,
            event.num_bytes / 2**20,
            1e3 * event.transfer_s,
            1e3 * event.exposed_s,
        )

    # ---- looking at it ----------------------------------------------------------------------------------------------

    @property
    def open_ids(self) -> frozenset[str]:
        return frozenset(self._receives)

    def check_integrity(self) -> None:
        """Raises AssertionError naming a receive whose record, timers, reads or records do not fit together."""
        pages: dict[int, str] = {}
        slots: dict[int, str] = {}
        for transfer_id, receive in self._receives.items():
            receive.driver.check_integrity(transfer_id)
            record = receive.driver.record
            assert record.reads == len(receive.groups), (
                f"{transfer_id}: {record.reads} reads, {len(receive.groups)} groups"
            )
            draining = record.phase is ReceivePhase.DRAINING
            assert (transfer_id in self.quarantine) == draining, f"{transfer_id} is {record.phase.name} in quarantine"
            for owners, indices in ((pages, receive.pages), (slots, (receive.slot,))):
                for index in indices:
                    owner = owners.setdefault(index, transfer_id)
                    assert owner == transfer_id, f"record {index} belongs to {owner} and {transfer_id}"
        self.quarantine.check_integrity()
        self.reader.check_integrity()
