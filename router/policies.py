"""Which rank gets a leg. A policy is a pure choice among candidates; counting and sending happen elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from router.config import PolicyName
from router.nodes import Role
from router.registry import Target


@dataclass(frozen=True, slots=True)
class Question:
    """What a policy may know about a request."""

    role: Role
    turn: int
    """One number per request, the same for both roles."""
    session: str | None = None
    """What says that two requests belong together; None when nothing does."""


Policy = Callable[[Sequence[Target], Question], Target]
"""Picks one of at least one candidates."""


def round_robin(candidates: Sequence[Target], question: Question) -> Target:
    """Every (node, rank) in turn. Both roles share the turn: with equal sizes prefill rank i meets decode rank i."""
    return candidates[question.turn % len(candidates)]


def least_loaded(candidates: Sequence[Target], question: Question) -> Target:
    """Prefill: the fewest prompt tokens queued. Decode: a free slot, then the largest share of free pages.

    What was sent since the last heartbeat counts on top of what it said. Equals take turns.
    """
    load = _prefill_load if question.role is Role.PREFILL else _decode_load
    first = question.turn % len(candidates)
    return min((*candidates[first:], *candidates[:first]), key=load)


def session_affinity(candidates: Sequence[Target], question: Question) -> Target:
    """One rank per session (rendezvous hashing: a rank that comes or goes moves only its own sessions).

    Requests without a session go to the least loaded.
    """
    if question.session is None:
        return least_loaded(candidates, question)
    session = question.session
    return max(candidates, key=lambda target: xxhash.xxh3_64_intdigest(f"{session}\0{target.name}".encode()))


def _prefill_load(target: Target) -> tuple[int, int]:
    load = target.load
    return load.queued_prompt_tokens + target.fresh_tokens, load.running + load.waiting + target.fresh_requests


def _decode_load(target: Target) -> tuple[int, float, int]:
    load = target.load
    requests = load.running + load.waiting + load.receiving + target.fresh_requests
    over = max(0, load.waiting + target.fresh_requests - load.slots_free) if load.slots_total else 0
    used = 1.0 - load.pages_free / load.pages_total if load.pages_total else 0.0
    # In steps of 1/32, so that a few pages do not outweigh a queue; fresh requests have no pages yet.
    return over, int(32 * used) + target.fresh_requests, requests


POLICIES: dict[PolicyName, Policy] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "session_affinity": session_affinity,
}
