"""The transfer agent of one rank, as its step thread sees it.

Every method validates, enqueues to the transfer thread and returns; what happened meanwhile is collected with `poll`.
`core.TransferCore` is what runs on that thread.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import msgspec
import uvloop

from kv_transfer.agent_events import AgentEvent, EpochRenewed, Quiet, Received, SendEnded
from kv_transfer.config import TransferConfig
from kv_transfer.core import TransferCore
from kv_transfer.format import StateFormat
from kv_transfer.regions import HOST_MEMORY, MemoryRegion, PoolMemory
from kv_transfer.threads import sleep_precisely
from kv_transfer.wire import check_id
from runtime.errors import TransferError
from runtime.requests import TransferStats

log = logging.getLogger(__name__)
T = TypeVar("T")

_ASK_TIMEOUT_S = 10.0


class _OpenSend(msgspec.Struct):
    """How much of a send the step thread has published."""

    num_pages: int
    published: int = 0
    ready: bool = False


class TransferAgent:
    """Hands this rank's states over and fetches others'. One per engine process; all calls from one thread.

    `pages` and `slots` describe the engine's pools and must stay valid until `stop` returned. `memory`: what
    they lie in. `wake` is called from the transfer thread after an event was queued.
    """

    def __init__(
        self,
        config: TransferConfig,
        state_format: StateFormat,
        *,
        pages: MemoryRegion,
        slots: MemoryRegion,
        rank: int,
        memory: PoolMemory = HOST_MEMORY,
        wake: Callable[[], None] | None = None,
    ) -> None:
        if pages.stride_bytes != state_format.page_bytes or slots.stride_bytes != state_format.slot_bytes:
            raise ValueError(
                f"the pools hold records of {pages.stride_bytes} and {slots.stride_bytes} bytes, "
                f"the format says {state_format.page_bytes} and {state_format.slot_bytes}"
            )
        self._format = state_format
        self._pages = pages
        self._slots = slots
        self._wake = wake
        self._events: deque[AgentEvent] = deque()
        self._sends: dict[str, _OpenSend] = {}
        self._receives: set[str] = set()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        self._core: TransferCore
        self._config = config
        self._rank = rank
        self._memory = memory
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"transfer-{rank}", daemon=True)
        self.address = ""
        """host:port of the hand-off service."""
        self.epoch = ""
        """The current incarnation, 32 hex digits. Changes when poll() reports EpochRenewed."""

    # ---- life -------------------------------------------------------------------------------------------------------

    def start(self, deadline_s: float = 30.0) -> None:
        """Returns when the engine runs on the configured transport, both pools are registered, and the service listens.

        Raises ConfigError for what the configuration or the machine does not allow, TransferError past the deadline.
        """
        self._thread.start()
        try:
            self._started.result(deadline_s)
        except TimeoutError:
            raise TransferError(f"the transfer agent did not start within {deadline_s} s") from None
        self.address, self.epoch = self._core.address, self._core.epoch

    def stop(self, grace_s: float = 10.0) -> None:
        """End every transfer, wait for reads in flight, destroy the engine. A thread that is stuck is left behind."""
        if self._thread.is_alive():
            self._call(self._core.stop)
            self._thread.join(grace_s)
            if self._thread.is_alive():
                log.error("the transfer thread did not end within %s s", grace_s)

    def _run(self) -> None:
        sleep_precisely()
        try:
            uvloop.run(self._main())
        except BaseException as error:  # reported by start() or poll(), on the thread that can act on it
            self._failure = error
            if self._started.done():
                log.exception("the transfer thread died")
                self._ring()
            else:
                self._started.set_exception(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._core = TransferCore(
            self._config,
            self._format,
            pages=self._pages,
            slots=self._slots,
            port=self._config.handoff_port + self._rank if self._config.handoff_port else 0,
            memory=self._memory,
            emit=self._emit,
        )
        await self._core.run(lambda: self._started.set_result(None))

    # ---- sending ----------------------------------------------------------------------------------------------------

    def open_send(self, transfer_id: str, num_tokens: int, prompt_hash: bytes) -> None:
        """A prefill was admitted: claims for it are answered from now on. Ended by SendEnded."""
        check_id(transfer_id)
        if num_tokens < 1:
            raise ValueError(f"transfer {transfer_id}: {num_tokens} tokens")
        if transfer_id in self._sends:
            raise ValueError(f"transfer {transfer_id} is already being sent")
        self._sends[transfer_id] = _OpenSend(self._format.num_pages(num_tokens))
        self._call(self._core.sender.open, transfer_id, num_tokens, prompt_hash)

    def publish_pages(self, transfer_id: str, indices: Sequence[int]) -> None:
        """These further pages, in prompt order, will not change any more. Ignored once the send has ended."""
        if self._publish(transfer_id, indices, last=False):
            self._call(self._core.sender.publish_pages, transfer_id, tuple(indices))

    def publish_ready(self, transfer_id: str, page_indices: Sequence[int], slot_index: int, payload: bytes) -> None:
        """The prompt is done: the remaining pages, the slot, and what the first token needs."""
        self._slots.address(slot_index)
        if self._publish(transfer_id, page_indices, last=True):
            self._call(self._core.sender.publish_ready, transfer_id, tuple(page_indices), slot_index, payload)

    def _publish(self, transfer_id: str, indices: Sequence[int], *, last: bool) -> bool:
        send = self._sends.get(transfer_id)
        if send is None:
            return False
        self._pages.check(indices)
        total = send.published + len(indices)
        if send.ready or total > send.num_pages or (last and total != send.num_pages):
            raise ValueError(
                f"transfer {transfer_id}: {len(indices)} more pages after {send.published} of {send.num_pages}"
                f"{', already ready' if send.ready else ''}"
            )
        send.published, send.ready = total, last
        return True

    def cancel_send(self, transfer_id: str, reason: str) -> None:
        """The prefill was given up. Answered by SendEnded, as soon as no decode rank can still rely on the state."""
        if transfer_id in self._sends:
            self._call(self._core.sender.cancel, transfer_id, reason)

    # ---- receiving --------------------------------------------------------------------------------------------------

    def open_receive(
        self,
        transfer_id: str,
        source_address: str,
        source_epoch: str,
        num_tokens: int,
        prompt_hash: bytes,
        page_indices: Sequence[int],
        slot_index: int,
    ) -> None:
        """Fetch a state into these pages and this slot, which belong to the transfer until Received or Quiet."""
        check_id(transfer_id)
        if transfer_id in self._receives:
            raise ValueError(f"transfer {transfer_id} is already being received")
        if num_tokens < 1 or len(page_indices) != self._format.num_pages(num_tokens):
            raise ValueError(f"transfer {transfer_id}: {len(page_indices)} pages for {num_tokens} tokens")
        if len(set(page_indices)) != len(page_indices):
            raise ValueError(f"transfer {transfer_id}: a page is given twice")
        self._pages.check(page_indices)
        self._slots.address(slot_index)
        self._receives.add(transfer_id)
        pages = tuple(page_indices)
        open_receive = self._core.receiver.open
        self._call(open_receive, transfer_id, source_address, source_epoch, num_tokens, prompt_hash, pages, slot_index)

    def cancel_receive(self, transfer_id: str) -> None:
        """The request is gone. Answered by Quiet, or by a Received that was already under way."""
        self._call(self._core.receiver.cancel, transfer_id)

    # ---- both -------------------------------------------------------------------------------------------------------

    def release(self, transfer_id: str) -> None:
        """The router gave the transfer up: let go of it on whichever side it is, now or when it turns up."""
        check_id(transfer_id)
        self._call(self._core.sender.release, transfer_id)
        self._call(self._core.receiver.release, transfer_id)

    def poll(self) -> list[AgentEvent]:
        """Events since the last call, in order. TransferError when the transfer thread has died."""
        if self._failure is not None:
            raise TransferError(f"the transfer thread died: {self._failure!r}") from self._failure
        events: list[AgentEvent] = []
        while self._events:
            event = self._events.popleft()
            match event:
                case SendEnded(transfer_id=transfer_id):
                    self._sends.pop(transfer_id, None)
                case Received(transfer_id=transfer_id) | Quiet(transfer_id=transfer_id):
                    self._receives.discard(transfer_id)
                case EpochRenewed(epoch=epoch):
                    self.epoch = epoch
            events.append(event)
        return events

    def stats(self) -> TransferStats:
        """A snapshot; waits for the transfer thread to take it."""
        return self._ask(self._core.stats)

    @property
    def latest_stats(self) -> TransferStats | None:
        """A snapshot of about half a second ago, without waiting; None before the first."""
        return self._core.latest_stats

    def check_integrity(self) -> None:
        """Raises AssertionError naming the transfer, page, read or timer that is leaked or inconsistent.

        An audit for tests and idle moments: it waits for the transfer thread. Poll first: transfers whose end was not
        collected count as open.
        """
        self._ask(self._core.check_integrity)
        core = self._core
        sending, receiving, events = self._ask(
            lambda: (core.sender.open_ids, core.receiver.open_ids, tuple(self._events))
        )
        pending_sends = {event.transfer_id for event in events if isinstance(event, SendEnded)}
        pending_receives = {event.transfer_id for event in events if isinstance(event, Received | Quiet)}
        assert sending <= self._sends.keys(), f"sends the engine does not know: {sending - self._sends.keys()}"
        assert self._sends.keys() <= sending | pending_sends, f"lost sends: {self._sends.keys() - sending}"
        assert receiving <= self._receives, f"receives the engine does not know: {receiving - self._receives}"
        assert self._receives <= receiving | pending_receives, f"lost receives: {self._receives - receiving}"

    # ---- between the threads ----------------------------------------------------------------------------------------

    def _call(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            raise TransferError("the transfer agent has stopped") from self._failure

    def _ask(self, function: Callable[[], T]) -> T:
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:  # raised again where it was asked
                answer.set_exception(error)

        self._call(run)
        try:
            return answer.result(_ASK_TIMEOUT_S)
        except TimeoutError:
            raise TransferError(f"the transfer thread did not answer within {_ASK_TIMEOUT_S} s") from None

    def _emit(self, event: AgentEvent) -> None:
        self._events.append(event)
        self._ring()

    def _ring(self) -> None:
        if self._wake is not None:
            self._wake()
