"""Every order of events around one transfer, explored exhaustively: two real machines per conversation, a network that
delays, duplicates and breaks, leases on two clocks, an engine and a router that act at any moment, processes that die.

A `World` is one state of all that. `moves` yields every next world; those marked forced are what must happen sooner or
later (a message arrives, a read ends, a deadline passes, the engine finishes what it computes).
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

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
    ReceivePhase,
    Receiving,
    RefuseArrived,
    ReleaseArrived,
    Released,
    RenewArrived,
    Requested,
    SendCancelled,
    SendClaim,
    SendFetched,
    Sending,
    SendPhase,
    SendRelease,
    StartReads,
    StartVerify,
    StateEnd,
    StateReady,
    TellProgress,
    TellReady,
    TellRefuse,
    TimedOut,
    Verified,
)
from kv_transfer.machine import TABLE, advance, timers
from kv_transfer.messages import Checksums

NUM_PAGES = 2
NUM_TOKENS = 300
END = StateEnd(0, b"first token", Checksums())
HASH = b"hash"
NAMES = (Claimant("a", 1), Claimant("b", 1))


class Decode(NamedTuple):
    """One decode rank's attempt, its stream, and what both clocks say about its lease."""

    record: Receiving = Receiving()
    up: tuple = ()
    """Messages on their way to prefill, oldest first."""
    down: tuple = ()
    stream: str = "none"
    """none, open, or who has yet to notice that it broke: both, prefill, decode, nobody."""
    asks: int = 0
    granted: int = 0
    """The latest ask whose grant arrived."""
    expired: int = 0
    """Asks up to this one have run out on decode's clock."""
    pinned_for: int = 0
    """The ask that prefill's lease was last restarted for."""
    reads: int = 0
    dirty: bool = False
    """A read ended successfully after prefill had let go."""
    given_back: int = 0
    verifying: bool = False
    alive: bool = True


class World(NamedTuple):
    send: Sending = Sending()
    decodes: tuple[Decode, ...] = (Decode(),)
    computed: int = 0
    """0: not admitted, 1: admitted, 2: one page published, 3: ready or cancelled."""
    ended: int = 0
    """EndSend so far."""
    prefill_alive: bool = True
    duplicates: int = 0
    renewals: int = 0
    releases: int = 0
    fences: int = 0
    deaths: int = 0


Move = tuple[str, bool, World]


def with_decode(world: World, i: int, **changes) -> World:
    decodes = list(world.decodes)
    decodes[i] = decodes[i]._replace(**changes)
    return world._replace(decodes=tuple(decodes))


def hear_prefill(world: World, event) -> World:
    """Prefill's machine hears an event; its actions reach streams, leases and the engine."""
    record, actions = advance(world.send, event)
    world = world._replace(send=record)
    for action in actions:
        match action:
            case Grant(claimant=claimant):
                world = with_decode(world, NAMES.index(claimant), pinned_for=record.ask)
            case TellProgress() | TellReady() | TellRefuse():
                i = NAMES.index(action.claimant)
                if world.decodes[i].stream == "open":
                    world = with_decode(world, i, down=(*world.decodes[i].down, action))
            case EndSend():
                world = world._replace(ended=world.ended + 1)
    return world


def hear_decode(world: World, i: int, event) -> World:
    """A decode machine hears an event; its actions reach the stream, the reads and the engine."""
    record, actions = advance(world.decodes[i].record, event)
    world = with_decode(world, i, record=record)
    for action in actions:
        me = world.decodes[i]
        match action:
            case SendClaim():
                world = say(with_decode(world, i, asks=me.asks + 1), i, ("claim", me.asks + 1))
            case SendFetched():
                world = say(world, i, ("fetched",))
            case SendRelease():
                world = say(world, i, ("release",))
            case StartReads():
                world = with_decode(world, i, reads=me.reads + 1)
            case StartVerify():
                world = with_decode(world, i, verifying=True)
            case EmitReceived():
                assert not me.dirty, "accepted bytes that were read after prefill had let go"
                assert me.reads == 0, "given to the engine with reads in flight"
                world = with_decode(world, i, given_back=me.given_back + 1)
            case EmitQuiet():
                assert me.reads == 0, "given back with reads in flight"
                world = with_decode(world, i, given_back=me.given_back + 1)
            case EmitFailed() | DropReads():
                pass
    return world


def say(world: World, i: int, message: tuple) -> World:
    me = world.decodes[i]
    return with_decode(world, i, up=(*me.up, message)) if me.stream == "open" else world


def deliver_up(world: World, i: int, message: tuple) -> World:
    name = NAMES[i]
    match message:
        case ("claim", ask):
            return hear_prefill(world, ClaimArrived(name, ask, NUM_TOKENS, HASH))
        case ("renew", ask):
            return hear_prefill(world, RenewArrived(name, ask))
        case ("fetched",):
            return hear_prefill(world, FetchedArrived(name))
    return hear_prefill(world, ReleaseArrived(name))


def deliver_down(world: World, i: int, message) -> World:
    if isinstance(message, TellRefuse):
        return hear_decode(world, i, RefuseArrived(message.reason, message.retryable))
    me = world.decodes[i]
    world = with_decode(world, i, granted=max(me.granted, message.ask))
    kind = ProgressArrived if isinstance(message, TellProgress) else ReadyArrived
    return hear_decode(world, i, kind(message.first_page, message.pages))


class Rules(NamedTuple):
    """How often the surprises may happen in one exploration."""

    decodes: int = 1
    duplicates: int = 0
    renewals: int = 0
    releases: int = 0
    fences: int = 0
    deaths: int = 0
    whims: bool = True
    """Failures and cancellations that concern one side alone. Two decode ranks are explored without them, with
    streams that open at once and of which only the first breaks: their product with everything else is too large."""


def moves(world: World, rules: Rules) -> Iterator[Move]:
    if world.prefill_alive:
        yield from prefill_moves(world, rules)
    for i in range(len(world.decodes)):
        yield from network_moves(world, rules, i)
        if world.decodes[i].expired < world.decodes[i].asks:
            yield "time passes", True, with_decode(world, i, expired=world.decodes[i].expired + 1)
        if world.decodes[i].alive:
            yield from decode_moves(world, rules, i)


def prefill_moves(world: World, rules: Rules) -> Iterator[Move]:
    if world.computed == 0:
        yield "admit", False, hear_prefill(world._replace(computed=1), Opened(NUM_TOKENS, HASH))
    if world.computed == 1 and rules.whims:
        yield "publish", True, hear_prefill(world._replace(computed=2), PagesFinal((7,)))
    if world.computed in (1, 2):
        rest = (7, 8)[world.computed - 1 :]
        yield "ready", True, hear_prefill(world._replace(computed=3), StateReady(rest, END))
        if rules.whims:
            cancelled = world._replace(computed=3)
            yield "cancel send", False, hear_prefill(cancelled, SendCancelled("aborted"))
    if world.releases < rules.releases and (rules.whims or world.computed == 3):
        yield "release prefill", False, hear_prefill(world._replace(releases=world.releases + 1), Released())
    for timer in timers(world.send):
        if timer.name == "claim_wait":
            yield "claim wait over", True, hear_prefill(world, ClaimWaitOver(timer.claimant))
        elif timer.name == "hold":
            yield "hold over", True, hear_prefill(world, HoldOver())
        else:
            me = world.decodes[NAMES.index(timer.claimant)]
            # Counted from before the question was sent, decode's lease always runs out first.
            if me.expired >= me.pinned_for:
                yield "lease lapses", True, hear_prefill(world, LeaseLapsed(timer.claimant))
    if world.deaths < rules.deaths:
        dead = world._replace(send=Sending(), prefill_alive=False, ended=1, computed=3, deaths=world.deaths + 1)
        for i in range(len(dead.decodes)):
            dead = break_stream(dead, i, prefill_knows=True)
        yield "prefill dies", False, dead


def break_stream(world: World, i: int, *, prefill_knows: bool = False, decode_knows: bool = False) -> World:
    """Whatever was on its way is lost; both ends notice, each in its own time."""
    me = world.decodes[i]
    if me.stream == "none":
        return world
    left = {"open": "both"}.get(me.stream, me.stream)
    if prefill_knows:
        left = {"both": "decode", "prefill": "nobody"}.get(left, left)
    if decode_knows:
        left = {"both": "prefill", "decode": "nobody"}.get(left, left)
    return with_decode(world, i, up=(), down=(), stream=left)


def network_moves(world: World, rules: Rules, i: int) -> Iterator[Move]:
    me = world.decodes[i]
    if me.stream == "open":
        if me.up and world.prefill_alive:
            yield "to prefill", True, deliver_up(with_decode(world, i, up=me.up[1:]), i, me.up[0])
            if world.duplicates < rules.duplicates:
                yield (
                    "to prefill twice",
                    False,
                    deliver_up(world._replace(duplicates=world.duplicates + 1), i, me.up[0]),
                )
        if me.down and me.alive:
            yield "to decode", True, deliver_down(with_decode(world, i, down=me.down[1:]), i, me.down[0])
            if world.duplicates < rules.duplicates:
                yield (
                    "to decode twice",
                    False,
                    deliver_down(world._replace(duplicates=world.duplicates + 1), i, me.down[0]),
                )
        if rules.whims or i == 0:
            yield "stream breaks", False, break_stream(world, i)
    if me.stream in ("both", "prefill"):
        noticed = with_decode(world, i, stream="decode" if me.stream == "both" else "nobody")
        yield "prefill notices", True, hear_prefill(noticed, ClaimantLost(NAMES[i]))
    if me.stream in ("both", "decode"):
        noticed = with_decode(world, i, stream="prefill" if me.stream == "both" else "nobody")
        yield "decode notices", True, hear_decode(noticed, i, PeerLost("stream broke")) if me.alive else noticed


def decode_moves(world: World, rules: Rules, i: int) -> Iterator[Move]:
    me = world.decodes[i]
    if me.record.phase is ReceivePhase.UNKNOWN and me.given_back == 0:
        # The ranks are alike: it is enough that the first one asks first.
        if i and world.decodes[i - 1].record.phase is ReceivePhase.UNKNOWN:
            return
        asked = hear_decode(world, i, Requested(NUM_PAGES))
        if not rules.whims:
            asked = hear_decode(with_decode(asked, i, stream="open"), i, Connected())
        yield "request", False, asked
        return
    if me.record.phase is ReceivePhase.CONNECTING:
        if world.prefill_alive:
            yield "connect", True, hear_decode(with_decode(world, i, stream="open"), i, Connected())
        if rules.whims:
            yield "cannot connect", False, hear_decode(world, i, PeerLost("no route"))
    if world.renewals < rules.renewals and me.record.phase in (ReceivePhase.CLAIMING, ReceivePhase.READING):
        renewed = with_decode(world._replace(renewals=world.renewals + 1), i, asks=me.asks + 1)
        yield "renew", False, say(renewed, i, ("renew", me.asks + 1))
    if me.reads:
        in_lease = me.granted > me.expired
        if world.prefill_alive:
            dirty = me.dirty or world.ended > 0
            ended = with_decode(world, i, reads=me.reads - 1, dirty=dirty)
            yield "reads end", True, hear_decode(ended, i, ReadsEnded(True, in_lease))
        if rules.whims or not world.prefill_alive:
            failed = with_decode(world, i, reads=me.reads - 1)
            yield "reads fail", not world.prefill_alive, hear_decode(failed, i, ReadsEnded(False, in_lease, "reset"))
    if me.verifying:
        checked = with_decode(world, i, verifying=False)
        yield "verified", True, hear_decode(checked, i, Verified(True))
        if rules.whims:
            yield "sums differ", False, hear_decode(checked, i, Verified(False, "sum"))
    for timer in timers(me.record):
        if timer.name != "lease" or me.granted <= me.expired:
            yield f"{timer.name} over", True, hear_decode(world, i, TimedOut(timer.name))
    if me.given_back == 0 and rules.whims:
        yield "cancel receive", False, hear_decode(world, i, Cancelled())
    if world.releases < rules.releases and rules.whims:
        yield "release decode", False, hear_decode(world._replace(releases=world.releases + 1), i, Released())
    if world.fences < rules.fences:
        fenced = with_decode(world._replace(fences=world.fences + 1), i, reads=0)
        yield "engine re-created", False, hear_decode(break_stream(fenced, i, decode_knows=True), i, Fenced())
    if world.deaths < rules.deaths:
        dead = with_decode(world._replace(deaths=world.deaths + 1), i, alive=False, reads=0, verifying=False)
        yield "decode dies", False, break_stream(dead, i, decode_knows=True)


def check(world: World) -> None:
    """What must hold in every reachable state."""
    opened = world.computed > 0
    assert world.ended <= (1 if opened or world.send.outcome == "released" else 0), "a send given back twice"
    if world.prefill_alive and opened:
        gone = world.send.phase is SendPhase.ENDED
        assert gone == (world.ended == 1), f"{world.send.phase.name} with {world.ended} ends"
    for me in world.decodes:
        assert me.given_back <= 1, "a receive given back twice"
        if me.alive:
            assert me.record.reads == me.reads, f"the machine counts {me.record.reads} reads, there are {me.reads}"
            assert (me.record.phase is ReceivePhase.ENDED) == (me.given_back == 1)


def is_over(world: World) -> bool:
    """Nothing is owned by a transfer any more."""
    sender_over = world.send.phase in (SendPhase.UNKNOWN, SendPhase.ENDED)
    return sender_over and all(
        not me.alive or me.record.phase in (ReceivePhase.UNKNOWN, ReceivePhase.ENDED) for me in world.decodes
    )


SCENARIOS = {
    "one decode rank, messages twice, renewals": Rules(duplicates=1, renewals=1),
    "one decode rank, releases, re-creation, deaths": Rules(releases=2, renewals=1, fences=1, deaths=1),
    "two decode ranks, one after the other, one release": Rules(decodes=2, releases=1, whims=False),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order_of_events_ends_with_everything_given_back_once(name):
    rules = SCENARIOS[name]
    worlds = [World(decodes=(Decode(),) * rules.decodes)]
    numbers = {worlds[0]: 0}
    """Places in `worlds`: to look a world up takes longer than to make it, so each move does it once."""
    forced: list[list[int]] = []
    for world in worlds:
        check(world)
        must = []
        for _, is_forced, following in moves(world, rules):
            number = numbers.setdefault(following, len(worlds))
            if number == len(worlds):
                worlds.append(following)
            if is_forced:
                must.append(number)
        forced.append(must)
        assert must or is_over(world), f"no exit from {world}"
    print(f"{name}: {len(worlds)} states")
    assert_acyclic(forced)


def assert_acyclic(forced: list[list[int]]) -> None:
    """Forced moves cannot go round in circles, so every run in which what must happen does happen comes to an end."""
    waiting = [0] * len(forced)
    for followers in forced:
        for follower in followers:
            waiting[follower] += 1
    free = [number for number, count in enumerate(waiting) if not count]
    removed = 0
    while free:
        removed += 1
        for follower in forced[free.pop()]:
            waiting[follower] -= 1
            if not waiting[follower]:
                free.append(follower)
    assert removed == len(forced), f"{len(forced) - removed} states lie on cycles of forced moves"


def test_the_table_has_a_rule_for_every_phase_and_event():
    from kv_transfer.events import ReceiveEvent, SendEvent

    wanted = {(phase, event) for phase in SendPhase for event in SendEvent.__args__}
    wanted |= {(phase, event) for phase in ReceivePhase for event in ReceiveEvent.__args__}
    assert set(TABLE) == wanted
