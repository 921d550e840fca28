"""Several ranks step together over gloo: one small all-gather before each step while anybody has work.

Rounds are numbered. In a round every rank says how many tokens it would run. After a round in which nobody had any, all
are idle and none calls the collective, until a rank gets work: it rings the bell for the next round and enters it, and
the others follow. All ranks see the same answers, so all agree on who is idle when.
"""

import logging
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.bell import Bell
from engine.parallel import StepIntent, StepPlan
from runtime.errors import EngineError

log = logging.getLogger(__name__)


class RankGroup:
    """The connections of one rank to its group: created together, closed together.

    The ranks meet at `host`:`port`, where rank 0 listens. `bell` is on the address at which the others reach this rank.
    `timeout_s` bounds the meeting and every later wait for a peer; a peer that dies is noticed at once.
    Raises EngineError when the others do not come.
    """

    def __init__(self, rank: int, size: int, host: str, port: int, bell: Bell, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.bell = bell
        timeout = timedelta(seconds=timeout_s)
        try:
            store = dist.TCPStore(host, port, size, is_master=rank == 0, timeout=timeout)
            store.set(f"bell/{rank}", bell.address)
            others = [store.get(f"bell/{peer}").decode() for peer in range(size) if peer != rank]
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=bell.host)]
            options._timeout = timeout
            self._backend = dist.ProcessGroupGloo(store, rank, size, options)
        except Exception as error:
            raise EngineError(f"rank {rank} cannot join its group of {size} at {host}:{port}: {error}") from error
        self._store = store
        bell.connect(others)

    def all_gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Equal shapes on all ranks -> everybody's tensor, by rank. Raises EngineError when a peer is gone or late."""
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            self._backend.allgather([everybody], [mine]).wait()
        except RuntimeError as error:
            raise EngineError(f"rank {self.rank} lost a peer: {error}") from error
        return everybody

    def all_reduce(self, summands: torch.Tensor) -> None:
        """In place: the sum over all ranks. Raises EngineError when a peer is gone or late."""
        try:
            self._backend.allreduce([summands]).wait()
        except RuntimeError as error:
            raise EngineError(f"rank {self.rank} lost a peer: {error}") from error

    def close(self) -> None:
        self.bell.close()
        self._backend.shutdown()


class Lockstep:
    """`parallel.Parallel` for the ranks of a group."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._round = 0
        self._idle = True
        self._stopped = False
        self.num_tokens: tuple[int, ...] = (0,) * group.size
        """What every rank runs in the current step."""

    @property
    def size(self) -> int:
        return self._group.size

    @property
    def busy(self) -> bool:
        return not self._stopped and (not self._idle or self._group.bell.latest > self._round)

    def agree(self, intent: StepIntent) -> StepPlan:
        if self._stopped or (self._idle and not intent.num_tokens and not self.busy):
            return StepPlan((0,) * self.size, decode_only=True)
        return self._next_round(intent, leaving=False)

    def leave(self) -> None:
        if self._stopped:
            return
        try:
            self._next_round(StepIntent(num_tokens=0, decode_only=True), leaving=True)
        except EngineError as error:
            log.info("leaving a group that is gone already: %s", error)
        self._stopped = True

    def _next_round(self, intent: StepIntent, *, leaving: bool) -> StepPlan:
        self._round += 1
        if self._idle:
            self._group.bell.ring(self._round)
        mine = torch.tensor([intent.num_tokens, intent.decode_only, leaving])
        answers = torch.stack(self._group.all_gather(mine))
        num_tokens, decode_only, leavers = answers.unbind(-1)
        self._idle = not bool(num_tokens.any())
        if leavers.any():
            # A step needs everybody, so there are no more steps.
            self._stopped = True
            num_tokens = torch.zeros_like(num_tokens)
        self.num_tokens = tuple(num_tokens.tolist())
        return StepPlan(self.num_tokens, bool(decode_only.all()))
