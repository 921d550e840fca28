"""Several ranks step together: before each step, while anybody has work, everybody tells everybody what it would run.

Rounds are numbered. In a round every rank sends one record and takes one of each other rank. After a round in which
nobody had any tokens all are idle, and nothing is sent until a rank gets work: it begins the next round, and its record
wakes the others, who follow. All ranks see the same records, so all agree on who is idle when.
"""

import logging
import struct
import time

from engine.parallel import StepIntent, StepPlan
from engine.peer_mesh import PeerMesh
from runtime.errors import EngineError

log = logging.getLogger(__name__)

_RECORD = struct.Struct("<QIIB3x")
"""Round, tokens, logits rows, flags."""
RECORD_BYTES = _RECORD.size
_DECODE_ONLY, _DRAINING, _DRAINED, _LEAVING = 1, 2, 4, 8
_FAREWELL = _DECODE_ONLY | _DRAINING | _DRAINED | _LEAVING
_ORPHAN_S = 15.0
"""A rank whose group has ended is told to stop as well; one that is not, because its node lives on, ends by itself."""


class Lockstep:
    """`parallel.Parallel` for the ranks of a group."""

    def __init__(self, mesh: PeerMesh, size: int, timeout_s: float) -> None:
        """`timeout_s`: how long a peer may take to answer in a round."""
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._round = 0
        self._idle = True
        self._said = 0
        """Whether this rank drains, as the others know."""
        self._left = False
        self._ended = ""
        self._ended_at = 0.0
        self.size = size
        self.plan = StepPlan((0,) * size, decode_only=True)
        """What all ranks run in the current step."""

    @property
    def num_rounds(self) -> int:
        return self._round

    @property
    def busy(self) -> bool:
        if self._left:
            return False
        if self._ended:
            return time.monotonic() > self._ended_at + _ORPHAN_S
        return not self._idle or self._mesh.pending

    def begin(self, timeout_s: float) -> None:
        """Before the first step: wait until every rank can take part. Raises as `agree` does."""
        self._exchange(_RECORD.pack(0, 0, 0, _DECODE_ONLY), timeout_s)

    def agree(self, intent: StepIntent) -> StepPlan:
        if self._ended and (intent.num_tokens or self.busy):
            raise EngineError(f"{self._ended}: no rank steps without it")
        if self._left or self._ended:
            self.plan = self._nothing(draining=True, drained=intent.drained)
        elif self._idle and not intent.num_tokens and _drain_flags(intent) == self._said and not self._mesh.pending:
            self.plan = self._nothing()
        else:
            self.plan = self._next_round(intent)
        return self.plan

    def _nothing(self, *, draining: bool = False, drained: bool = False) -> StepPlan:
        return StepPlan((0,) * self.size, decode_only=True, draining=draining, drained=drained)

    def leave(self) -> None:
        if not self._left:
            self._left = True
            if not self._ended:
                self._mesh.send(_RECORD.pack(self._round + 1, 0, 0, _FAREWELL))
            self._mesh.stop_watching()

    def _next_round(self, intent: StepIntent) -> StepPlan:
        self._round += 1
        self._said = _drain_flags(intent)
        flags = self._said | (_DECODE_ONLY if intent.decode_only else 0)
        mine = _RECORD.pack(self._round, intent.num_tokens, intent.num_logits, flags)
        all_flags = any_flags = flags
        num_tokens = [0] * self.size
        num_tokens[self._mesh.rank] = intent.num_tokens
        max_logits = intent.num_logits
        leavers = []
        for peer, record in self._exchange(mine, self._timeout_s).items():
            number, num_tokens[peer], num_logits, their_flags = _RECORD.unpack(record)
            if number != self._round:
                raise EngineError(f"rank {self._mesh.rank} is in round {self._round}, rank {peer} in {number}")
            max_logits = max(max_logits, num_logits)
            all_flags &= their_flags
            any_flags |= their_flags
            if their_flags & _LEAVING:
                leavers.append(peer)
        if leavers:
            self._end(leavers)
            return self._nothing(draining=True, drained=intent.drained)
        self._idle = not any(num_tokens)
        return StepPlan(
            tuple(num_tokens),
            bool(all_flags & _DECODE_ONLY),
            max_logits,
            bool(any_flags & _DRAINING),
            bool(all_flags & _DRAINED),
        )

    def _exchange(self, record: bytes, timeout_s: float) -> dict[int, bytes]:
        self._mesh.send(record)
        return self._mesh.receive(timeout_s)

    def _end(self, leavers: list[int]) -> None:
        self._ended = f"rank(s) {', '.join(map(str, leavers))} left the group"
        self._ended_at = time.monotonic()
        self._mesh.stop_watching()
        log.info("%s: the steps of all have ended", self._ended)


def _drain_flags(intent: StepIntent) -> int:
    return (_DRAINING if intent.draining else 0) | (_DRAINED if intent.drained else 0)
