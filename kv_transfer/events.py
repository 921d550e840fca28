"""What the transfer machine hears, what it remembers, and what it asks for. Plain data; `machine.py` has the rules.

One record describes one transfer on one side. Timers are not stored: which of them run follows from the record
(`machine.timers`), so none can be forgotten when a state is left.
"""

from enum import Enum

import msgspec

from kv_transfer.messages import Checksums


class Claimant(msgspec.Struct, frozen=True, order=True):
    """One attempt of one incarnation of a decode rank to fetch a state."""

    epoch: str
    attempt: int


# ---- the sending side -----------------------------------------------------------------------------------------------


class SendPhase(Enum):
    UNKNOWN = "unknown"
    PARKED = "parked"
    """Claimed before the prefill request arrived."""
    COMPUTING = "computing"
    READY = "ready"
    ENDING = "ending"
    """Over, but a claimant that was told Ready may still be reading inside its lease."""
    ENDED = "ended"
    """Remembered only to answer late messages."""


class StateEnd(msgspec.Struct, frozen=True):
    """What Ready adds to the pages."""

    slot: int
    payload: bytes
    checksums: Checksums


class Sending(msgspec.Struct, frozen=True):
    """A transfer as the prefill rank sees it."""

    phase: SendPhase = SendPhase.UNKNOWN
    num_tokens: int = 0
    prompt_hash: bytes = b""
    pages: tuple[int, ...] = ()
    """Final pages, in prompt order."""
    end: StateEnd | None = None
    claimant: Claimant | None = None
    ask: int = 0
    """The claimant's latest message number."""
    told: int = 0
    """How many of `pages` the claimant knows."""
    lingering: frozenset[Claimant] = frozenset()
    """Former claimants that were told Ready and whose lease has not run out: they may still accept what they read."""
    former: frozenset[Claimant] = frozenset()
    """Attempts that are over. Their late messages change nothing."""
    outcome: str = ""


class Opened(msgspec.Struct, frozen=True):
    """The engine admitted the prefill."""

    num_tokens: int
    prompt_hash: bytes


class PagesFinal(msgspec.Struct, frozen=True):
    pages: tuple[int, ...]


class StateReady(msgspec.Struct, frozen=True):
    pages: tuple[int, ...]
    end: StateEnd


class SendCancelled(msgspec.Struct, frozen=True):
    """The engine gave the prefill up, or this agent is stopping."""

    reason: str


class Released(msgspec.Struct, frozen=True):
    """Both sides: the router gave the transfer up."""


class ClaimArrived(msgspec.Struct, frozen=True):
    claimant: Claimant
    ask: int
    num_tokens: int
    prompt_hash: bytes


class RenewArrived(msgspec.Struct, frozen=True):
    claimant: Claimant
    ask: int


class FetchedArrived(msgspec.Struct, frozen=True):
    claimant: Claimant


class ReleaseArrived(msgspec.Struct, frozen=True):
    """The claimant will not use the state."""

    claimant: Claimant


class ClaimantLost(msgspec.Struct, frozen=True):
    """The claimant's stream broke."""

    claimant: Claimant


class LeaseLapsed(msgspec.Struct, frozen=True):
    claimant: Claimant


class ClaimWaitOver(msgspec.Struct, frozen=True):
    claimant: Claimant


class HoldOver(msgspec.Struct, frozen=True):
    """Nobody claimed a finished state in time."""


class Grant(msgspec.Struct, frozen=True):
    """Action: the claimant's lease starts anew, now."""

    claimant: Claimant


class TellProgress(msgspec.Struct, frozen=True):
    claimant: Claimant
    ask: int
    first_page: int
    pages: tuple[int, ...]


class TellReady(msgspec.Struct, frozen=True):
    claimant: Claimant
    ask: int
    first_page: int
    pages: tuple[int, ...]
    end: StateEnd
    prompt_hash: bytes


class TellRefuse(msgspec.Struct, frozen=True):
    claimant: Claimant
    reason: str
    retryable: bool


class EndSend(msgspec.Struct, frozen=True):
    """Action: the engine gets its pages and slot back."""

    outcome: str


# ---- the receiving side ---------------------------------------------------------------------------------------------


class ReceivePhase(Enum):
    UNKNOWN = "unknown"
    CONNECTING = "connecting"
    CLAIMING = "claiming"
    """Claimed; nothing announced yet."""
    READING = "reading"
    VERIFYING = "verifying"
    """All bytes arrived inside the lease."""
    DRAINING = "draining"
    """Failed or cancelled; reads into its pages are still in flight: quarantine."""
    ENDED = "ended"


class Receiving(msgspec.Struct, frozen=True):
    """A transfer as the decode rank sees it."""

    phase: ReceivePhase = ReceivePhase.UNKNOWN
    num_pages: int = 0
    known: int = 0
    """Pages announced so far."""
    ready: bool = False
    reads: int = 0
    """Groups of reads started and not ended."""


class Requested(msgspec.Struct, frozen=True):
    """The engine gave pages and a slot to fill."""

    num_pages: int


class Connected(msgspec.Struct, frozen=True):
    """Hello was exchanged and the data path is open."""


class ProgressArrived(msgspec.Struct, frozen=True):
    first_page: int
    pages: tuple[int, ...]


class ReadyArrived(msgspec.Struct, frozen=True):
    first_page: int
    pages: tuple[int, ...]


class RefuseArrived(msgspec.Struct, frozen=True):
    reason: str
    retryable: bool


class PeerLost(msgspec.Struct, frozen=True):
    """No stream to the prefill rank, or it broke."""

    reason: str


class ReadsEnded(msgspec.Struct, frozen=True):
    """A group of reads is over: nothing of it will touch memory again."""

    ok: bool
    in_lease: bool
    reason: str = ""


class TimedOut(msgspec.Struct, frozen=True):
    """A deadline of the receiving side passed: lease, progress of reads, or wait for Ready."""

    reason: str


class Verified(msgspec.Struct, frozen=True):
    ok: bool
    reason: str = ""


class Cancelled(msgspec.Struct, frozen=True):
    """The engine no longer wants it."""


class Fenced(msgspec.Struct, frozen=True):
    """The transfer engine was re-created: no read from before exists any more."""


class SendClaim(msgspec.Struct, frozen=True):
    """Action."""


class StartReads(msgspec.Struct, frozen=True):
    """Action: read these remote pages into the transfer's own, from position `first_page`; the slot too if asked."""

    first_page: int
    pages: tuple[int, ...]
    with_slot: bool


class DropReads(msgspec.Struct, frozen=True):
    """Action: submit no further read of this transfer; those in flight end by themselves."""


class StartVerify(msgspec.Struct, frozen=True):
    """Action: compare checksums, then report Verified."""


class SendFetched(msgspec.Struct, frozen=True):
    """Action."""


class SendRelease(msgspec.Struct, frozen=True):
    """Action: tell the prefill rank that this attempt is over."""

    reason: str


class EmitReceived(msgspec.Struct, frozen=True):
    """Action: pages and slot are the engine's again, filled."""


class EmitFailed(msgspec.Struct, frozen=True):
    """Action: tell the engine; pages and slot stay with the transfer until EmitQuiet."""

    reason: str
    retryable: bool


class EmitQuiet(msgspec.Struct, frozen=True):
    """Action: pages and slot are the engine's again."""


# ---- timers ---------------------------------------------------------------------------------------------------------


class Timer(msgspec.Struct, frozen=True, order=True):
    """A deadline that a record's state implies. The name says which configured duration it has."""

    name: str
    claimant: Claimant | None = None


SendEvent = (
    Opened
    | PagesFinal
    | StateReady
    | SendCancelled
    | Released
    | ClaimArrived
    | RenewArrived
    | FetchedArrived
    | ReleaseArrived
    | ClaimantLost
    | LeaseLapsed
    | ClaimWaitOver
    | HoldOver
)
SendAction = Grant | TellProgress | TellReady | TellRefuse | EndSend
ReceiveEvent = (
    Requested
    | Connected
    | ProgressArrived
    | ReadyArrived
    | RefuseArrived
    | PeerLost
    | ReadsEnded
    | TimedOut
    | Verified
    | Cancelled
    | Released
    | Fenced
)
ReceiveAction = (
    SendClaim | StartReads | DropReads | StartVerify | SendFetched | SendRelease | EmitReceived | EmitFailed | EmitQuiet
)
