"""The rules of a hand-off: one table of transitions for both sides, without clock or I/O.

    prefill   UNKNOWN ─▶ PARKED ─▶ COMPUTING ─▶ READY ─▶ ENDING ─▶ ENDED
    decode    UNKNOWN ─▶ CONNECTING ─▶ CLAIMING ─▶ READING ─▶ VERIFYING ─▶ ENDED
                              └───────────┴───────────┴─▶ DRAINING ─▶ ENDED

`advance(record, event)` returns the next record and the actions its owner has to carry out. Every pair of phase and
event is in TABLE; `_ignore` marks those that come late or twice and change nothing.

What the rules guarantee (tests explore every order of events):
* The engine gets each send back exactly once (EndSend), and never while a claimant that was told Ready could still
  accept what it reads: such a claimant either said that it is done (Fetched, Release) or its lease ran out.
* The engine gets each receive back exactly once (EmitReceived or EmitQuiet), and never while a read is in flight.
* EmitReceived only if all pages and the slot were read inside the lease.
* Every phase but COMPUTING has a timer or an outstanding answer that ends it; COMPUTING belongs to the engine, which
  ends it with StateReady or SendCancelled.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import msgspec

from kv_transfer.events import (
    Cancelled,
    Claimant,
    ClaimantLost,
    ClaimArrived,
    ClaimWaitOver,
    Connected,
    DropReads,
    EmitFailed,
    EmitQuiet,
    EmitReceived,
    EndSend,
    Fenced,
    FetchedArrived,
    Grant,
    HoldOver,
    LeaseLapsed,
    Opened,
    PagesFinal,
    PeerLost,
    ProgressArrived,
    ReadsEnded,
    ReadyArrived,
    ReceiveAction,
    ReceiveEvent,
    ReceivePhase,
    Receiving,
    RefuseArrived,
    ReleaseArrived,
    Released,
    RenewArrived,
    Requested,
    SendAction,
    SendCancelled,
    SendClaim,
    SendEvent,
    SendFetched,
    Sending,
    SendPhase,
    SendRelease,
    StartReads,
    StartVerify,
    StateReady,
    TellProgress,
    TellReady,
    TellRefuse,
    TimedOut,
    Timer,
    Verified,
)

Sent = tuple[Sending, tuple[SendAction, ...]]
Got = tuple[Receiving, tuple[ReceiveAction, ...]]
_set = msgspec.structs.replace


@overload
def advance(record: Sending, event: SendEvent) -> Sent: ...
@overload
def advance(record: Receiving, event: ReceiveEvent) -> Got: ...
def advance(record: Any, event: Any) -> Any:
    return TABLE[record.phase, type(event)](record, event)


def timers(record: Sending | Receiving) -> frozenset[Timer]:
    """The deadlines that must be running in this state.

    Prefill: `claim_wait`, `lease` (restarted by Grant), `hold`. Decode: `connect`, `ready` (from the claim to Ready),
    `stall` (restarted by any progress of reads), `lease` (restarted by grants that arrive).
    """
    if isinstance(record, Sending):
        names = {Timer("lease", claimant) for claimant in record.lingering}
        if record.claimant is not None and record.phase is SendPhase.PARKED:
            names.add(Timer("claim_wait", record.claimant))
        elif record.claimant is not None:
            names.add(Timer("lease", record.claimant))
        elif record.phase is SendPhase.READY:
            names.add(Timer("hold"))
        return frozenset(names)
    match record.phase:
        case ReceivePhase.CONNECTING:
            return frozenset({Timer("connect")})
        case ReceivePhase.CLAIMING:
            return frozenset({Timer("ready")})
        case ReceivePhase.READING:
            waits = {Timer("lease")}
            if record.reads:
                waits.add(Timer("stall"))
            if not record.ready:
                waits.add(Timer("ready"))
            return frozenset(waits)
    return frozenset()


def _ignore(record: Any, event: Any) -> Any:
    return record, ()


# ---- prefill --------------------------------------------------------------------------------------------------------


def _announce(record: Sending) -> Sent:
    """Renew the claimant's lease and tell it everything from the start; it skips what it knows."""
    assert record.claimant is not None
    told = _set(record, told=len(record.pages))
    if record.end is None:
        news: SendAction = TellProgress(record.claimant, record.ask, 0, record.pages)
    else:
        news = TellReady(record.claimant, record.ask, 0, record.pages, record.end, record.prompt_hash)
    return told, (Grant(record.claimant), news)


def _disagreement(record: Sending, num_tokens: int, prompt_hash: bytes) -> str | None:
    if record.num_tokens != num_tokens:
        return f"claimed {num_tokens} tokens, the prompt has {record.num_tokens}"
    if record.prompt_hash != prompt_hash:
        return f"prompt hashes differ: {prompt_hash.hex()} claimed, {record.prompt_hash.hex()} computed"
    return None


def _open(record: Sending, event: Opened) -> Sent:
    return Sending(SendPhase.COMPUTING, event.num_tokens, event.prompt_hash), ()


def _open_parked(record: Sending, event: Opened) -> Sent:
    assert record.claimant is not None
    opened = Sending(SendPhase.COMPUTING, event.num_tokens, event.prompt_hash, former=record.former)
    reason = _disagreement(opened, record.num_tokens, record.prompt_hash)
    if reason is not None:
        return _set(opened, former=record.former | {record.claimant}), (TellRefuse(record.claimant, reason, False),)
    return _announce(_set(opened, claimant=record.claimant, ask=record.ask))


def _reopen(record: Sending, event: Opened) -> Sent:
    if record.outcome == "released":
        return record, (EndSend("released"),)
    return _open(record, event)


def _park(record: Sending, event: ClaimArrived) -> Sent:
    """Also a second claim while parked: the newer one waits, the older one is over."""
    if event.claimant in record.former:
        return record, (TellRefuse(event.claimant, "this attempt is over", True),)
    refusals = _superseded(record, event.claimant)
    parked = Sending(
        SendPhase.PARKED,
        event.num_tokens,
        event.prompt_hash,
        claimant=event.claimant,
        ask=max(event.ask, record.ask if event.claimant == record.claimant else 0),
        former=record.former | {refusal.claimant for refusal in refusals},
    )
    return parked, refusals


def _superseded(record: Sending, newcomer: Claimant) -> tuple[TellRefuse, ...]:
    if record.claimant is None or record.claimant == newcomer:
        return ()
    return (TellRefuse(record.claimant, f"attempt {newcomer.attempt} of {newcomer.epoch[:8]} replaces this one", True),)


def _claim(record: Sending, event: ClaimArrived) -> Sent:
    reason = _disagreement(record, event.num_tokens, event.prompt_hash)
    if reason is not None:
        return record, (TellRefuse(event.claimant, reason, False),)
    if event.claimant in record.former:
        return record, (TellRefuse(event.claimant, "this attempt is over", True),)
    refusals = _superseded(record, event.claimant)
    if record.claimant == event.claimant:
        record = _set(record, ask=max(record.ask, event.ask))
    else:
        record = _set(_part(record, linger=True), claimant=event.claimant, ask=event.ask)
    record, actions = _announce(record)
    return record, (*refusals, *actions)


def _part(record: Sending, *, linger: bool) -> Sending:
    """The claimant's attempt is over. `linger`: it does not know yet, and may still accept if it was told Ready."""
    if record.claimant is None:
        return record
    return _set(
        record,
        claimant=None,
        told=0,
        ask=0,
        former=record.former | {record.claimant},
        lingering=record.lingering | {record.claimant} if linger and record.end is not None else record.lingering,
    )


def _let_go(record: Sending, outcome: str) -> Sent:
    """Over as soon as nobody can accept it any more."""
    if record.lingering:
        return _set(record, phase=SendPhase.ENDING, outcome=outcome), ()
    return _ended(record, outcome), (EndSend(outcome),)


def _ended(record: Sending, outcome: str) -> Sending:
    return Sending(SendPhase.ENDED, record.num_tokens, record.prompt_hash, former=record.former, outcome=outcome)


def _refuse(record: Sending, event: ClaimArrived | RenewArrived) -> Sent:
    if record.outcome == "released":
        return record, (TellRefuse(event.claimant, "the transfer was released", False),)
    return record, (TellRefuse(event.claimant, f"the state is gone: {record.outcome or 'unknown'}", True),)


def _renew_parked(record: Sending, event: RenewArrived) -> Sent:
    if event.claimant != record.claimant:
        return record, (TellRefuse(event.claimant, "this attempt is over", True),)
    return _set(record, ask=max(record.ask, event.ask)), ()


def _renew(record: Sending, event: RenewArrived) -> Sent:
    if event.claimant != record.claimant:
        return record, (TellRefuse(event.claimant, "this attempt is over", True),)
    record = _set(record, ask=max(record.ask, event.ask))
    return record, (Grant(event.claimant), TellProgress(event.claimant, record.ask, record.told, ()))


def _add_pages(record: Sending, event: PagesFinal) -> Sent:
    record = _set(record, pages=record.pages + event.pages)
    if record.claimant is None:
        return record, ()
    news = TellProgress(record.claimant, record.ask, record.told, record.pages[record.told :])
    return _set(record, told=len(record.pages)), (news,)


def _become_ready(record: Sending, event: StateReady) -> Sent:
    record = _set(record, phase=SendPhase.READY, pages=record.pages + event.pages, end=event.end)
    if record.claimant is None:
        return record, ()
    rest = record.pages[record.told :]
    news = TellReady(record.claimant, record.ask, record.told, rest, event.end, record.prompt_hash)
    return _set(record, told=len(record.pages)), (news,)


def _give_up(record: Sending, outcome: str, reason: str, retryable: bool) -> Sent:
    refusals = () if record.claimant is None else (TellRefuse(record.claimant, reason, retryable),)
    record, actions = _let_go(_part(record, linger=True), outcome)
    return record, (*refusals, *actions)


def _cancel_send(record: Sending, event: SendCancelled) -> Sent:
    return _give_up(record, "failed", event.reason, True)


def _release_send(record: Sending, event: Released) -> Sent:
    return _give_up(record, "released", "the transfer was released", False)


def _forget_parked(record: Sending, outcome: str, refusal: TellRefuse | None) -> Sent:
    return _ended(_part(record, linger=False), outcome), () if refusal is None else (refusal,)


def _release_parked(record: Sending, event: Released) -> Sent:
    assert record.claimant is not None
    return _forget_parked(record, "released", TellRefuse(record.claimant, "the transfer was released", False))


def _cancel_parked(record: Sending, event: SendCancelled) -> Sent:
    assert record.claimant is not None
    return _forget_parked(record, "", TellRefuse(record.claimant, event.reason, True))


def _end_claim_wait(record: Sending, event: ClaimWaitOver) -> Sent:
    if event.claimant != record.claimant:
        return record, ()
    return _forget_parked(record, "", TellRefuse(event.claimant, "no prefill for this transfer arrived in time", True))


def _leave_parked(record: Sending, event: ReleaseArrived | ClaimantLost) -> Sent:
    return _forget_parked(record, "", None) if event.claimant == record.claimant else (record, ())


def _remember_release(record: Sending, event: Released) -> Sent:
    return _ended(record, "released"), ()


def _fetched(record: Sending, event: FetchedArrived) -> Sent:
    if event.claimant == record.claimant:
        return _let_go(_part(record, linger=False), "fetched")
    return _set(record, lingering=record.lingering - {event.claimant}), ()


def _leave(record: Sending, event: ReleaseArrived) -> Sent:
    if event.claimant == record.claimant:
        record = _part(record, linger=False)
    return _set(record, lingering=record.lingering - {event.claimant}), ()


def _lose_claimant(record: Sending, event: ClaimantLost) -> Sent:
    return (_part(record, linger=True) if event.claimant == record.claimant else record), ()


def _lapse(record: Sending, event: LeaseLapsed) -> Sent:
    if event.claimant == record.claimant:
        return _part(record, linger=False), (TellRefuse(event.claimant, "the lease ran out", True),)
    return _set(record, lingering=record.lingering - {event.claimant}), ()


def _end_hold(record: Sending, event: HoldOver) -> Sent:
    return (record, ()) if record.claimant is not None else _let_go(record, "expired")


def _settle(record: Sending, event: FetchedArrived | ReleaseArrived | LeaseLapsed) -> Sent:
    return _let_go(_set(record, lingering=record.lingering - {event.claimant}), record.outcome)


# ---- decode ---------------------------------------------------------------------------------------------------------


def _request(record: Receiving, event: Requested) -> Got:
    return Receiving(ReceivePhase.CONNECTING, event.num_pages), ()


def _connect(record: Receiving, event: Connected) -> Got:
    return _set(record, phase=ReceivePhase.CLAIMING), (SendClaim(),)


def _stop(record: Receiving, *actions: ReceiveAction) -> Got:
    """Leave with `actions`; the pages are quiet now or when the last read ended."""
    if record.reads:
        return _set(record, phase=ReceivePhase.DRAINING), (DropReads(), *actions)
    return Receiving(ReceivePhase.ENDED), (*actions, EmitQuiet())


def _fail(record: Receiving, reason: str, retryable: bool) -> Got:
    return _stop(record, SendRelease(reason), EmitFailed(reason, retryable))


def _progress(record: Receiving, event: ProgressArrived) -> Got:
    if record.ready:
        return record, ()
    if event.first_page > record.known or event.first_page + len(event.pages) > record.num_pages:
        return _fail(record, _bad_list(record, event), False)
    news = event.pages[record.known - event.first_page :]
    record = _set(record, phase=ReceivePhase.READING)
    if not news:
        return record, ()
    first = record.known
    record = _set(record, known=first + len(news), reads=record.reads + 1)
    return record, (StartReads(first, news, False),)


def _become_complete(record: Receiving, event: ReadyArrived) -> Got:
    if record.ready:
        return record, ()
    if event.first_page > record.known or event.first_page + len(event.pages) != record.num_pages:
        return _fail(record, _bad_list(record, event), False)
    news = event.pages[record.known - event.first_page :]
    first = record.known
    record = _set(record, phase=ReceivePhase.READING, known=record.num_pages, ready=True, reads=record.reads + 1)
    return record, (StartReads(first, news, True),)


def _bad_list(record: Receiving, event: ProgressArrived | ReadyArrived) -> str:
    return (
        f"the peer announced {len(event.pages)} pages from position {event.first_page}, "
        f"{record.known} of {record.num_pages} were known"
    )


def _refused(record: Receiving, event: RefuseArrived) -> Got:
    return _fail(record, event.reason, event.retryable)


def _lose_peer(record: Receiving, event: PeerLost) -> Got:
    return _stop(record, EmitFailed(event.reason, True))


def _time_out(record: Receiving, event: TimedOut) -> Got:
    return _fail(record, event.reason, True)


def _end_reads(record: Receiving, event: ReadsEnded) -> Got:
    record = _set(record, reads=record.reads - 1)
    if not event.ok:
        return _fail(record, event.reason, True)
    if not event.in_lease:
        return _fail(record, "a read ended after the lease", True)
    if record.ready and not record.reads:
        return _set(record, phase=ReceivePhase.VERIFYING), (StartVerify(),)
    return record, ()


def _verified(record: Receiving, event: Verified) -> Got:
    if not event.ok:
        return _fail(record, event.reason, True)
    return Receiving(ReceivePhase.ENDED), (EmitReceived(), SendFetched())


def _cancel_receive(record: Receiving, event: Cancelled) -> Got:
    return _stop(record, SendRelease("the request is gone"))


def _release_receive(record: Receiving, event: Released) -> Got:
    return _fail(record, "the transfer was released", False)


def _fence(record: Receiving, event: Fenced) -> Got:
    return _fail(_set(record, reads=0), "the transfer engine was re-created", True)


def _drain(record: Receiving, event: ReadsEnded) -> Got:
    record = _set(record, reads=record.reads - 1)
    return (record, ()) if record.reads else (Receiving(ReceivePhase.ENDED), (EmitQuiet(),))


def _fence_drained(record: Receiving, event: Fenced) -> Got:
    return Receiving(ReceivePhase.ENDED), (EmitQuiet(),)


# ---- the table ------------------------------------------------------------------------------------------------------

Rule = Callable[[Any, Any], Any]
_S, _R = SendPhase, ReceivePhase
_CONVERSING = (_R.CLAIMING, _R.READING)


def _rows(phases: Iterable[SendPhase | ReceivePhase], rules: dict[type, Rule]) -> dict[tuple[Any, type], Rule]:
    return {(phase, event): rule for phase in phases for event, rule in rules.items()}


TABLE: dict[tuple[SendPhase | ReceivePhase, type], Rule] = {
    **_rows(SendPhase, dict.fromkeys(SendEvent.__args__, _ignore)),
    **_rows(ReceivePhase, dict.fromkeys(ReceiveEvent.__args__, _ignore)),
    # prefill
    **_rows([_S.UNKNOWN], {Opened: _open, ClaimArrived: _park, RenewArrived: _refuse, Released: _remember_release}),
    **_rows(
        [_S.PARKED],
        {
            Opened: _open_parked,
            ClaimArrived: _park,
            RenewArrived: _renew_parked,
            ReleaseArrived: _leave_parked,
            ClaimantLost: _leave_parked,
            ClaimWaitOver: _end_claim_wait,
            SendCancelled: _cancel_parked,
            Released: _release_parked,
        },
    ),
    **_rows(
        [_S.COMPUTING, _S.READY],
        {
            ClaimArrived: _claim,
            RenewArrived: _renew,
            ReleaseArrived: _leave,
            ClaimantLost: _lose_claimant,
            LeaseLapsed: _lapse,
            SendCancelled: _cancel_send,
            Released: _release_send,
        },
    ),
    **_rows([_S.COMPUTING], {PagesFinal: _add_pages, StateReady: _become_ready}),
    **_rows([_S.READY], {FetchedArrived: _fetched, HoldOver: _end_hold}),
    **_rows(
        [_S.ENDING],
        {
            ClaimArrived: _refuse,
            RenewArrived: _refuse,
            FetchedArrived: _settle,
            ReleaseArrived: _settle,
            LeaseLapsed: _settle,
        },
    ),
    **_rows([_S.ENDED], {Opened: _reopen, ClaimArrived: _refuse, RenewArrived: _refuse, Released: _remember_release}),
    # decode
    **_rows([_R.UNKNOWN], {Requested: _request}),
    **_rows([_R.CONNECTING], {Connected: _connect}),
    **_rows(_CONVERSING, {ProgressArrived: _progress, ReadyArrived: _become_complete}),
    **_rows([_R.READING], {ReadsEnded: _end_reads}),
    **_rows(
        [_R.CONNECTING, *_CONVERSING],
        {RefuseArrived: _refused, PeerLost: _lose_peer, TimedOut: _time_out, Fenced: _fence},
    ),
    **_rows([_R.VERIFYING], {Verified: _verified}),
    **_rows(
        [_R.CONNECTING, *_CONVERSING, _R.VERIFYING],
        {Cancelled: _cancel_receive, Released: _release_receive},
    ),
    **_rows([_R.DRAINING], {ReadsEnded: _drain, Fenced: _fence_drained}),
}
