"""What to do about a leg that failed before the client saw anything: a pure decision.

| failed | next |
|---|---|
| decode unreachable, gone or full, while its prefill rank is well | another decode rank claims the same transfer |
| decode in another way, or there is no other decode rank | a new transfer, other ranks preferred on both sides |
| prefill, in any way | a new transfer on another prefill rank, or on the same if it is alone |
| any, after `max_attempts`, or because a deadline passed | the error goes to the client |

Under `kv_load_failure_policy: fail` only failures before any work are tried again: no connection, or a full queue.
"""

import enum
from dataclasses import dataclass
from typing import Literal

from router.errors import RouteError
from router.exchange import ConnectFailed, UpstreamError, UpstreamTimeout


class Step(enum.Enum):
    OTHER_DECODE = "other_decode"
    """Same transfer, another decode rank."""
    NEW_TRANSFER = "new_transfer"
    """Both legs again, under a new id."""
    GIVE_UP = "give_up"


@dataclass(frozen=True, slots=True)
class Failure:
    """How one leg failed. Exactly one of `error` and `status` is set."""

    leg: Literal["prefill", "decode"]
    node: str
    error: UpstreamError | None = None
    status: int = 0
    retry_after: str | None = None

    @property
    def untouched(self) -> bool:
        """The node did no work for this leg."""
        return isinstance(self.error, ConnectFailed) or self.status == 503

    @property
    def says_node_is_bad(self) -> bool:
        """Other requests had better avoid this node for a moment."""
        return self.error is not None and not isinstance(self.error, UpstreamTimeout)

    def __str__(self) -> str:
        what = self.error if self.error is not None else f"{self.node} answered {self.status}"
        return f"{self.leg}: {what}"

    def as_error(self) -> RouteError:
        """What the client reads when nothing more is tried. No addresses: those are in the log."""
        if self.status == 503:
            seconds = self.retry_after if self.retry_after is not None and self.retry_after.isdigit() else "1"
            return RouteError(
                "Every node that could serve this request is full.",
                status=503,
                code="overloaded",
                retry_after_s=float(seconds),
            )
        if isinstance(self.error, UpstreamTimeout):
            return RouteError(f"The {self.leg} node did not answer in time.", status=504, code="upstream_timeout")
        return RouteError(f"The {self.leg} node failed to answer this request.", status=502, code="upstream_failed")


@dataclass(frozen=True, slots=True)
class Facts:
    """What else counts."""

    attempt: int
    """1 for the first."""
    max_attempts: int
    recompute: bool
    """kv_load_failure_policy: recompute."""
    state_held: bool
    """The prefill rank of the current transfer is well and has, or will have, the state."""
    other_decode: bool
    """A usable decode rank that does not know this transfer yet."""


def decide(failure: Failure, facts: Facts) -> Step:
    """The table above."""
    if facts.attempt >= facts.max_attempts or isinstance(failure.error, UpstreamTimeout):
        return Step.GIVE_UP
    if not facts.recompute and not failure.untouched:
        return Step.GIVE_UP
    state_untouched = failure.error is not None or failure.status == 503
    if failure.leg == "decode" and state_untouched and facts.state_held and facts.other_decode:
        return Step.OTHER_DECODE
    return Step.NEW_TRANSFER
