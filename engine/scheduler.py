"""Which requests run in the next step: a pure function from what is there to what is done.

Decode tokens first, one a request. Prompts share what is left of `max_num_batched_tokens`: the oldest is sure of a
share of it, the rest goes to those with the least left to compute, so neither long nor short prompts can starve.
Requests are admitted first come first served within their priority, with all pages of their tokens so far, so that
only decoding ever asks for more; when that finds no free page, the youngest request gives everything back and is
computed again later. Prefills for other ranks never grow and are never preempted: a claimant may be reading them.

At least one request always moves on: a request that must grow is itself a candidate for preemption, and one that runs
alone has all pages that are not lent to transfers, which come back by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Limits:
    """The configured bounds."""

    max_num_seqs: int
    max_num_batched_tokens: int
    min_prompt_tokens: int
    """Tokens a step leaves to prompts even when decoding alone reaches the bound."""
    max_held_requests: int
    long_prefill_share: float
    reserved_pages: int
    """Free pages that admission leaves to those already running, so that they are not preempted at once."""
    chunk_alignment: int = 1
    """Chunks end at multiples of this where they can: sums over a compressed block are then made in one go, and a
    prompt's state does not depend on how it was cut."""


@dataclass(frozen=True, slots=True)
class Waiting(Generic[R]):
    """A request that owns nothing yet."""

    request: R
    num_tokens: int
    """To compute, or that arrive with the transfer."""
    num_pages: int
    sends: bool
    receives: bool
    max_chunk: int
    """Tokens of it that one step may compute."""


@dataclass(frozen=True, slots=True)
class Prefilling(Generic[R]):
    """A request in the middle of its prompt."""

    request: R
    num_computed: int
    num_tokens: int
    """Left to compute."""
    max_chunk: int


@dataclass(frozen=True, slots=True)
class Victim(Generic[R]):
    """A request that may be preempted."""

    request: R
    num_pages: int
    growing: bool
    """It needs a page for its next token."""


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[R]):
    """What there is before a step."""

    num_decoding: int
    num_growing: int
    """Decoding requests whose next token needs a new page."""
    num_receiving: int
    num_sends: int
    """States held for other ranks, those being computed included."""
    prefilling: Sequence[Prefilling[R]]
    """In order of admission right."""
    waiting: Sequence[Waiting[R]]
    """The first ones, in order; more than the free slots are never looked at."""
    victims: Sequence[Victim[R]]
    """Youngest first. Only looked at when fewer pages are free than `num_growing`."""
    free_pages: int
    free_slots: int


@dataclass(frozen=True, slots=True)
class Plan(Generic[R]):
    """What to do, in this order."""

    preempt: tuple[R, ...]
    receive: tuple[R, ...]
    """Waiting requests that get pages and a slot and start to fetch their state."""
    admit: tuple[R, ...]
    """Waiting requests that get pages and a slot and start to compute."""
    chunks: tuple[tuple[R, int], ...]
    """(request, tokens) of the prompts computed in this step; the decode tokens of all who decode come on top."""


def plan_step(snapshot: Snapshot[R], limits: Limits) -> Plan[R]:
    """Decide one step."""
    preempt = _choose_victims(snapshot)
    receive: list[Waiting[R]] = []
    admit: list[Waiting[R]] = []
    if preempt:
        # What was freed is for those who grow. Admitting now could hand it to the very request that gave it back.
        gone = {id(victim.request) for victim in preempt}
        prefilling = [item for item in snapshot.prefilling if id(item.request) not in gone]
        num_decoding = snapshot.num_decoding - (len(preempt) - (len(snapshot.prefilling) - len(prefilling)))
    else:
        prefilling = list(snapshot.prefilling)
        num_decoding = snapshot.num_decoding
        receive, admit = _choose_admissions(snapshot, limits)
    prompts = prefilling + [Prefilling(item.request, 0, item.num_tokens, item.max_chunk) for item in admit]
    budget = max(limits.max_num_batched_tokens - num_decoding, limits.min_prompt_tokens)
    return Plan(
        preempt=tuple(victim.request for victim in preempt),
        receive=tuple(item.request for item in receive),
        admit=tuple(item.request for item in admit),
        chunks=_share_out(prompts, budget, limits),
    )


def _choose_victims(snapshot: Snapshot[R]) -> list[Victim[R]]:
    victims: list[Victim[R]] = []
    free, growing = snapshot.free_pages, snapshot.num_growing
    for victim in snapshot.victims:
        if growing <= free:
            break
        victims.append(victim)
        free += victim.num_pages
        growing -= victim.growing
    assert growing <= free, f"{growing} requests must grow, {free} pages, nobody left to preempt"
    return victims


def _choose_admissions(snapshot: Snapshot[R], limits: Limits) -> tuple[list[Waiting[R]], list[Waiting[R]]]:
    receive: list[Waiting[R]] = []
    admit: list[Waiting[R]] = []
    active = snapshot.num_decoding + len(snapshot.prefilling) + snapshot.num_receiving
    free_pages = snapshot.free_pages - snapshot.num_growing
    free_slots = snapshot.free_slots
    num_sends = snapshot.num_sends
    for item in snapshot.waiting:
        if active >= limits.max_num_seqs or not free_slots:
            break
        if item.sends and num_sends >= limits.max_held_requests:
            break
        if item.num_pages + (limits.reserved_pages if active else 0) > free_pages:
            # Nobody overtakes: the pages that come back must reach the one that needs many.
            break
        (receive if item.receives else admit).append(item)
        active += 1
        free_slots -= 1
        free_pages -= item.num_pages
        num_sends += item.sends
    return receive, admit


def _share_out(prompts: Sequence[Prefilling[R]], budget: int, limits: Limits) -> tuple[tuple[R, int], ...]:
    """Divide `budget` tokens; `prompts` in order of right. The oldest always moves on."""
    if not prompts:
        return ()
    oldest = prompts[0]
    share = budget if len(prompts) == 1 else max(1, int(budget * limits.long_prefill_share))
    first = min(oldest.num_tokens, oldest.max_chunk, share)
    granted = [0] * len(prompts)
    granted[0] = _align(oldest, first, limits.chunk_alignment) or first
    budget -= granted[0]
    for index in sorted(range(len(prompts)), key=lambda i: (prompts[i].num_tokens, i)):
        item = prompts[index]
        most = min(item.num_tokens, item.max_chunk, granted[index] + budget)
        more = max(0, _align(item, most, limits.chunk_alignment) - granted[index])
        granted[index] += more
        budget -= more
    return tuple((item.request, tokens) for item, tokens in zip(prompts, granted, strict=True) if tokens)


def _align(item: Prefilling[R], tokens: int, alignment: int) -> int:
    """The largest chunk up to `tokens` that ends the prompt or at a multiple of `alignment`; 0 if there is none."""
    if tokens == item.num_tokens:
        return tokens
    end = (item.num_computed + tokens) // alignment * alignment
    return max(0, end - item.num_computed)
