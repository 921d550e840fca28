"""Every live request of a rank and where it is: waiting, in its prompt, in a row, or with a transfer.

The one place that moves requests between phases, so that memory, rows and queues always change together.
"""

import bisect
import logging
from collections.abc import Sequence

import torch

from engine.config import EngineConfig
from engine.connector import Connector, FirstToken, NoConnector
from engine.intake import EngineShape
from engine.page_pool import PagePool
from engine.pool import PoolCorrupted
from engine.pools import StatePools
from engine.request import Phase, Request
from engine.request_times import RequestTimes
from engine.rows import Rows
from engine.sampling_rows import SamplingRows
from engine.scheduler import Prefilling, Snapshot, Victim, Waiting
from engine.slot_pool import SlotPool
from engine.transfers import Transfers
from runtime.requests import ReceiveState, SendState

log = logging.getLogger(__name__)

_SCORED_CHUNK = 256
"""Tokens a step computes of a prompt with log-probabilities: each costs a line of logits over the vocabulary."""


class LiveRequests:
    """Owner of the requests, of both pools, and of the rows."""

    def __init__(
        self, config: EngineConfig, shape: EngineShape, connector: Connector | NoConnector, device: torch.device
    ) -> None:
        self._shape = shape
        self._max_num_seqs = config.max_num_seqs
        self.pools = StatePools(PagePool(shape.num_pages, shape.page_tokens), SlotPool(shape.num_slots))
        self.transfers = Transfers(connector, self.pools)
        self.rows = Rows(config.max_num_seqs, self.pools.pages.pages_for(shape.max_model_len))
        self.sampling = SamplingRows(config.max_num_seqs, shape.vocab_size, shape.eos_ids, device)
        self.waiting: list[Request] = []
        """In the order in which they are admitted."""
        self.prefilling: list[Request] = []
        """In the same order."""
        self.finishing: list[Request] = []
        """Their last step is under way: whatever it yields, they are in no step after it."""
        self._by_id: dict[str, Request] = {}
        self.num_preempted = 0
        self.times = RequestTimes()

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, request_id: str) -> Request | None:
        return self._by_id.get(request_id)

    def all(self) -> list[Request]:
        return list(self._by_id.values())

    def max_generated(self, request: Request) -> int:
        """Output tokens at which it ends."""
        return min(request.sampling.max_tokens, self._shape.max_model_len - request.num_prompt)

    # In

    def add(self, request: Request) -> None:
        """A new request, waiting. Raises RequestError if its hand-off cannot be served."""
        if request.handoff is not None:
            self.transfers.expect(request)
        self._by_id[request.request_id] = request
        self._enqueue(request)

    def requeue(self, request: Request) -> None:
        """Its state did not arrive: it waits again, to be computed here."""
        request.enter(Phase.WAITING)
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=_order)

    # Between two steps

    def snapshot(self) -> Snapshot[Request]:
        """What the scheduler decides on."""
        growing = self.rows.growing(self._shape.page_tokens)
        free_pages, free_slots = self.pools.pages.num_free, self.pools.slots.num_free
        victims: Sequence[Victim[Request]] = ()
        if len(growing) > free_pages:
            victims = self._victims({self.rows.requests[row].request_id for row in growing.tolist()})
        return Snapshot(
            num_decoding=len(self.rows),
            num_growing=len(growing),
            num_receiving=self.transfers.num_receiving,
            num_sends=self.transfers.num_sends,
            prefilling=[
                Prefilling(
                    request, request.num_computed, request.num_tokens - request.num_computed, _max_chunk(request)
                )
                for request in self.prefilling
            ],
            waiting=[self._as_waiting(request) for request in self.waiting[: min(free_slots, self._max_num_seqs)]],
            victims=victims,
            free_pages=free_pages,
            free_slots=free_slots,
        )

    def _victims(self, growing: set[str]) -> list[Victim[Request]]:
        youngest_first = sorted((*self.rows.requests, *self.prefilling), key=_order, reverse=True)
        return [
            Victim(request, len(request.owned.page_ids), request.request_id in growing)
            for request in youngest_first
            if not isinstance(request.handoff, SendState)
        ]

    def _as_waiting(self, request: Request) -> Waiting[Request]:
        return Waiting(
            request=request,
            num_tokens=request.num_tokens,
            num_pages=self.pools.pages.pages_for(request.num_tokens),
            sends=isinstance(request.handoff, SendState),
            receives=isinstance(request.handoff, ReceiveState),
            max_chunk=_max_chunk(request),
        )

    def preempt(self, request: Request) -> None:
        """It gives everything back and waits again; its tokens so far are computed anew."""
        log.info("request %s preempted after %d tokens: out of pages", request.request_id, request.num_tokens)
        self.num_preempted += 1
        self.leave_step(request)
        self._give_back(request)
        request.forget_state()
        self.requeue(request)

    def grow(self) -> None:
        """A page for every row whose next token needs one."""
        for row in self.rows.growing(self._shape.page_tokens).tolist():
            self.rows.add_page(row, self.pools.grow(self.rows.requests[row].owned))

    def receive(self, request: Request) -> None:
        """From waiting: its state is fetched into memory of its own."""
        self._take(request)
        request.enter(Phase.RECEIVING)
        self.transfers.receive(request)

    def admit(self, request: Request) -> None:
        """From waiting: its tokens are computed from the next step on."""
        self._take(request)
        request.enter(Phase.PREFILLING)
        bisect.insort(self.prefilling, request, key=_order)
        if request.handoff is not None:
            self.transfers.open_send(request)

    def _take(self, request: Request) -> None:
        self.waiting.remove(request)
        request.state = self.pools.take(request.request_id, request.num_tokens)

    # In a step

    def enter_rows(self, request: Request, context_len: int) -> int:
        """It yields a token in every step from now on. Returns its row, whose newest token is for the caller to set."""
        row = self.rows.add(request, context_len, self.max_generated(request))
        self.sampling.add(row, request)
        return row

    def finish(self, request: Request) -> None:
        """The step that was just launched is its last."""
        self.leave_step(request)
        self.finishing.append(request)

    def leave_step(self, request: Request) -> None:
        """It computes no more."""
        if self.rows.row_of(request) is not None:
            self.sampling.remove(*self.rows.remove(request))
        if request in self.finishing:
            self.finishing.remove(request)
        if request in self.prefilling:
            self.prefilling.remove(request)

    # Out

    def hold(self, request: Request, first: FirstToken) -> None:
        """Its caller has the answer; the state waits for whoever fetches it."""
        self.leave_step(request)
        del self._by_id[request.request_id]
        self.transfers.hold(request, first)
        self.times.over(request.clock)

    def end(self, request: Request, reason: str) -> None:
        """It is over. What it owns is free now or, where a transfer may still touch it, when that has ended."""
        del self._by_id[request.request_id]
        if request in self.waiting:
            self.waiting.remove(request)
        self.leave_step(request)
        if request.handoff is not None:
            self.transfers.cancel(request, reason)
        self._give_back(request)
        request.enter(Phase.DONE)
        self.times.over(request.clock)

    def _give_back(self, request: Request) -> None:
        if request.state is not None:
            self.pools.give_back(request.state)
            request.state = None

    def check_integrity(self) -> None:
        """Audit between two steps. Raises PoolCorrupted naming requests and ids."""
        for request in self._by_id.values():
            if (request.state is None) != (request.phase is Phase.WAITING):
                raise PoolCorrupted(f"{request.request_id} is {request.phase.value} and owns {request.state}")
        owned = [request.state for request in self._by_id.values() if request.state is not None]
        self.pools.check_integrity([*owned, *self.transfers.states()])
        placed = [*self.waiting, *self.prefilling, *self.rows.requests, *self.finishing, *self.transfers.receiving]
        names = sorted(request.request_id for request in placed)
        if names != sorted(self._by_id):
            raise PoolCorrupted(f"live requests {sorted(self._by_id)}, but queues and rows hold {names}")
        for row, request in enumerate(self.rows.requests):
            pages = self.rows.page_table[row, : self.rows.num_pages[row]].tolist()
            if pages != request.owned.page_ids or self.rows.slot[row] != request.owned.slot_id:
                raise PoolCorrupted(f"row {row} computes with pages {pages}, {request.request_id} has {request.state}")


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _max_chunk(request: Request) -> int:
    return request.num_tokens if request.prompt_logprobs is None else _SCORED_CHUNK
