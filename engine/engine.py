"""The step loop of one rank: requests in, tokens out, one forward pass per step.

    submit ─► waiting ─► scheduler ─► batch ─► forward + sample ─► tokens ─► outbox
                 ▲           │                                       │
                 └─ preempt ─┘            transfers ◄─ hold / receive┘

With asynchronous scheduling a step is launched before the one before it is collected, so the device never waits for the
host: its decode tokens come from where that step left them on the device. What only the host can see in a token (a stop
id, the end of a grammar) is then seen one step late, and what that step computed too much is dropped. Ends that are
known beforehand, by length or because the state is for another rank, are never late. Whatever cannot wait collects
first: preemption, and rows whose choice depends on the newest token.

All methods belong to the step thread. Between two steps every page and slot is free, owned by one live request, lent to
a transfer, or fenced until the step in flight has ended; `check_integrity` proves it.
"""

import itertools
import logging
from collections.abc import Sequence

import numpy as np
import torch

from engine.batch import BatchBuilder, Chunk, PaddedShape, StepBatch
from engine.config import EngineConfig
from engine.connector import Connector, EpochRenewed, NoConnector
from engine.decode_graphs import CudaCapture, DecodeGraphs, auto_widths, no_capture
from engine.emitter import Emitter
from engine.flight import Flight, LaunchedChunk
from engine.intake import EngineShape, check_submit
from engine.live import LiveRequests
from engine.outbox import Outbox
from engine.parallel import Parallel, SingleRank, StepIntent, StepPlan
from engine.pool import Use
from engine.profiling import spans
from engine.request import ConstraintFactory, ConstraintMatcher, Phase, Request
from engine.runner import Forward, Head, Runner, Scoring, StepResult, feed
from engine.scheduler import Limits, plan_step
from engine.transfers import Arrived, Missing, Unwanted
from runtime.errors import EngineError, Overloaded, RequestError
from runtime.histogram import STEP_TOKENS, Histogram
from runtime.requests import (
    Drained,
    EngineStats,
    EpochChanged,
    FromEngine,
    GroupDrains,
    ReceiveState,
    SendState,
    Submit,
)

log = logging.getLogger(__name__)

_PAGE_RESERVE = 0.01
"""Part of the pages that admission leaves free for those already running."""


class Engine:
    """Runs requests on one rank.

    forward, head: the model bound to this rank's pages and slots, cut where captured decode steps end; without a head
    `forward` returns logits.
    connector: how state moves to and from other ranks; None for a rank alone.
    constraints: makes grammar matchers; None refuses requests that need one.
    handoff_address: what peers are told after the transfer engine was re-created.
    """

    def __init__(
        self,
        config: EngineConfig,
        shape: EngineShape,
        forward: Forward,
        *,
        head: Head = lambda logits: logits,
        connector: Connector | NoConnector | None = None,
        constraints: ConstraintFactory | None = None,
        parallel: Parallel | None = None,
        device: torch.device | None = None,
        rank: int = 0,
        handoff_address: str = "",
    ) -> None:
        device = device or torch.device("cpu")
        self.config = config
        self.shape = shape
        self.rank = rank
        self._handoff_address = handoff_address
        self._live = LiveRequests(config, shape, connector or NoConnector(), device)
        self._rows = self._live.rows
        self._constraints = constraints
        self._parallel: Parallel = parallel or SingleRank()
        max_pages = self._rows.page_table.shape[1]
        self._builder = BatchBuilder(
            config.max_step_tokens, config.max_num_seqs, max_pages, device, spare_slot=shape.num_slots
        )
        sampled = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device)
        self._graphs: DecodeGraphs | None = None
        if config.cudagraph_capture_sizes and config.cudagraph_capture_sizes != "auto":
            capture = CudaCapture(device) if device.type == "cuda" else no_capture
            self._graphs = DecodeGraphs(config.cudagraph_capture_sizes, auto_widths(max_pages), capture)
        self._runner = Runner(forward, head, sampled, self._graphs)

        def compute(step: StepBatch) -> torch.Tensor:
            feed(step, sampled)
            return forward(step.batch)

        if self._graphs is not None:
            try:
                self._graphs.capture(self._builder, compute)
            except BaseException:
                self._graphs.close()
                raise
        self._flight: Flight | None = None
        """The step that was launched and not yet collected."""
        self._limits = Limits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            min_prompt_tokens=min(shape.page_tokens, config.max_num_batched_tokens),
            max_held_requests=config.max_held_requests,
            long_prefill_share=config.long_prefill_share,
            reserved_pages=max(1, int(shape.num_pages * _PAGE_RESERVE)),
            chunk_alignment=shape.chunk_alignment,
        )
        self._span = spans(config.profiler_ranges, device)
        self._runs_ahead = config.async_scheduling == "on"
        self._counting = np.arange(config.max_num_seqs)
        self._outbox = Outbox()
        self._emitter = Emitter(shape, self._live, self._outbox)
        self._arrivals = 0
        self._changed = False
        self._failures_in_a_row = 0
        self._draining = False
        self._said_empty = False
        self._drained = False
        self._group_drains = False
        self._steps = self._recomputed = self._prompt_tokens = 0
        self._step_tokens = Histogram(STEP_TOKENS)

    # Requests in

    def submit(self, submit: Submit) -> None:
        """Take a request. What is wrong with it is answered with `RequestFailed` after the next step."""
        try:
            self._accept(submit)
        except RequestError as error:
            kind = "transfer" if error.code == "released" else "invalid"
            self._outbox.fail(submit.request_id, kind, str(error))
        except Overloaded as error:
            self._outbox.fail(submit.request_id, "overloaded", str(error))

    def _accept(self, submit: Submit) -> None:
        if self._live.get(submit.request_id) is not None:
            # Two streams under one id cannot be told apart any more: neither may go on.
            self.abort(submit.request_id)
            raise RequestError(f"request id {submit.request_id} was in use", param="request_id")
        if self._draining:
            raise Overloaded("the engine is draining and takes no new requests")
        if len(self._live.waiting) >= self.config.max_queued_requests:
            raise Overloaded(f"{len(self._live.waiting)} requests are waiting, the bound of the queue")
        check_submit(submit, self.shape)
        self._live.add(Request(submit, self._arrivals, self._matcher(submit)))
        self._arrivals += 1
        self._changed = True

    def _matcher(self, submit: Submit) -> ConstraintMatcher | None:
        if submit.sampling.constraint is None:
            return None
        if self._constraints is None:
            raise RequestError("structured output is not available on this node", param="response_format")
        matcher = self._constraints(submit.sampling.constraint)
        try:
            for token_id in submit.generated_ids:
                matcher.accept(token_id)
        except Exception as error:
            raise RequestError(f"the resumed tokens do not follow the grammar: {error}") from error
        return matcher

    def abort(self, request_id: str) -> None:
        """Forget a request in any phase. Its memory is free at once, or when the transfer that touches it ends."""
        request = self._live.get(request_id)
        if request is not None:
            self._live.end(request, "aborted by the caller")

    def release(self, transfer_id: str) -> None:
        """The router gave up a transfer; a request still waiting for its turn with it fails."""
        request = self._live.transfers.release(transfer_id)
        if request is not None:
            request.handoff = None
            self._emitter.fail(request, "transfer", f"transfer {transfer_id} was released by the router")

    def drain(self) -> None:
        """Refuse new requests; `Drained` is said when everything running and promised is done, on all ranks that step
        together."""
        self._draining = True

    def fail_all(self, reason: str) -> None:
        """The process ends: every live request fails with the reason."""
        for request in self._live.all():
            self._emitter.fail(request, "internal", reason)

    def leave_group(self) -> None:
        """The process ends: ranks that step together with this one must not wait for it."""
        self._parallel.leave()

    def close(self) -> None:
        """The engine steps no more. To be called before the group of ranks that it steps with is closed."""
        if self._graphs is not None:
            self._graphs.close()

    def take_messages(self) -> list[FromEngine]:
        """What there is to say before the next step."""
        return self._outbox.take()

    # One step

    @property
    def has_work(self) -> bool:
        """`step` should be called again at once: some request computes, one that waits may have room now, or other
        ranks wait for this one. Without work, call it when a message or a transfer event has arrived.
        """
        live = self._live
        if self._parallel.busy or self._flight is not None:
            return True
        if self._draining and not self._said_empty and self._is_empty:
            return True
        return bool(self._rows or live.prefilling or self._outbox or (live.waiting and self._changed))

    @property
    def _is_empty(self) -> bool:
        """Nothing runs and nothing is promised."""
        return not self._live and self._live.transfers.is_empty and self._flight is None

    def step(self) -> list[FromEngine]:
        """Take in transfer events, decide, launch, and say what the last launched step, or this one, has yielded.

        Raises EngineError after `max_step_failures` failed steps in a row, or after one in a group of several ranks.
        """
        self._take_in_events()
        if self._outbox:
            # A first token that came across must not wait for the decode step that follows it.
            self._changed = True
            return self._outbox.take()
        collected = self._flight is not None
        if collected and self._live.sampling.needs_history(len(self._rows)):
            self._collect_flight()
        snapshot = self._live.snapshot()
        if snapshot.num_growing > snapshot.free_pages and collected:
            # Somebody would be preempted and lose a token, while pages may be waiting for the step in flight to end.
            self._collect_flight()
            snapshot = self._live.snapshot()
        with self._span("schedule"):
            plan = plan_step(snapshot, self._limits)
        for request in plan.preempt:
            self._live.preempt(request)
        self._live.grow()
        for request in plan.receive:
            self._live.receive(request)
        for request in plan.admit:
            self._live.admit(request)
        chunks = [_chunk(request, num_tokens) for request, num_tokens in plan.chunks]
        num_tokens = len(self._rows) + sum(chunk.num_tokens for chunk in chunks)
        num_logits = len(self._rows) + sum(chunk.completes + len(chunk.scored) for chunk in chunks)
        self._said_empty = self._draining and self._is_empty
        agreed = self._parallel.agree(StepIntent(num_tokens, not chunks, num_logits, self._draining, self._said_empty))
        if agreed.runs:
            self._compute(chunks, agreed)
        elif collected:
            self._collect_flight()
        self._changed = agreed.runs or collected
        if agreed.drained and not self._drained:
            self._drained = True
            self._outbox.add(Drained(self.rank))
        elif agreed.draining and not self._draining and not self._group_drains:
            self._group_drains = True
            self._outbox.add(GroupDrains(self.rank))
        return self._outbox.take()

    def _take_in_events(self) -> None:
        for outcome in self._live.transfers.poll():
            match outcome:
                case Arrived(request, event):
                    self._emitter.join(request, event)
                case Missing(request, message, retryable):
                    if retryable and self.config.kv_load_failure_policy == "recompute":
                        log.warning("request %s: %s; computing its prompt here", request.request_id, message)
                        self._recomputed += 1
                        self._live.requeue(request)
                    else:
                        self._emitter.fail(request, "transfer", message)
                case Unwanted(request, ending):
                    request.handoff = None
                    self._emitter.fail(request, "transfer", f"its state was given up while it was computed ({ending})")
                case EpochRenewed(epoch):
                    self._outbox.add(EpochChanged(self.rank, epoch, self._handoff_address))

    def _compute(self, chunks: Sequence[Chunk], agreed: StepPlan) -> None:
        """Launch a step; collect the one before it, and this one too if nothing is scheduled ahead."""
        try:
            with self._span("launch"):
                flight = self._launch(chunks, agreed)
        except Exception as error:
            self._collect_flight()
            self._fail_step(error, chunks)
            return
        older, self._flight = self._flight, flight
        if older is not None:
            self._collect(older)
        if not self._runs_ahead:
            self._collect_flight()

    def _launch(self, chunks: Sequence[Chunk], agreed: StepPlan) -> Flight:
        rows, live = self._rows, self._live
        num_decode = len(rows)
        step = self._builder.build(rows, num_decode, chunks, self._padded_shape(agreed))
        ended = [LaunchedChunk.of(chunk) for chunk in chunks]
        for chunk in chunks:
            if chunk.completes:
                live.enter_rows(chunk.request, chunk.request.num_tokens)
        requests = rows.requests
        count = len(requests)
        inputs = live.sampling.inputs(requests, rows.num_generated)
        launched = self._runner.launch(step, inputs, live.sampling.record, count, self._scoring(chunks))
        live.pools.step_launched()
        rows.context_len[:num_decode] += 1
        rows.num_generated[:count] += 1
        self._step_tokens.observe(num_decode + sum(chunk.num_tokens for chunk in chunks))
        flight = Flight.of(rows, num_decode, ended, launched)
        rows.source[:count] = self._counting[:count]
        for part in ended:
            part.request.num_computed = part.num_written
            if part.completes:
                live.prefilling.remove(part.request)
                if isinstance(part.request.handoff, SendState):
                    # One more token would change the state that the other rank is to get.
                    live.finish(part.request)
        for row in np.flatnonzero(flight.last).tolist():
            request = flight.requests[row]
            if rows.row_of(request) is not None:
                live.finish(request)
        return flight

    def _padded_shape(self, agreed: StepPlan) -> PaddedShape | None:
        """The captured step that this one runs as. With several ranks, that of the one with the most requests."""
        if self._graphs is None or not agreed.decode_only:
            return None
        num_pages = int(self._rows.num_pages[: len(self._rows)].max(initial=1))
        return self._graphs.shape_for(max(agreed.num_tokens), num_pages)

    def _scoring(self, chunks: Sequence[Chunk]) -> Scoring | None:
        scored = [chunk for chunk in chunks if chunk.scored]
        if not scored:
            return None
        counts = [chunk.request.sampling.prompt_logprobs or 0 for chunk in scored]
        targets = [chunk.request.prompt[chunk.scored.start + 1 : chunk.scored.stop + 1] for chunk in scored]
        return Scoring(np.concatenate(targets), self.shape.vocab_size if min(counts) < 0 else max(counts))

    # A step's results

    def _collect_flight(self) -> None:
        """Whatever was launched is over after this."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._collect(flight)

    def _collect(self, flight: Flight) -> None:
        """Wait for the step. If it is the newest, the next one finds its tokens on the host."""
        try:
            with self._span("wait"):
                result = flight.launched.wait()
        except Exception as error:
            self._live.pools.step_collected()
            self._fail_step(error, flight.chunks)
            return
        self._live.pools.step_collected()
        self._failures_in_a_row = 0
        self._steps += 1
        if self._flight is None:
            self._rows.take_tokens(result.token_ids)
        with self._span("emit"):
            self._advance(flight.chunks, result)
            self._emitter.emit(flight, result)

    def _advance(self, chunks: Sequence[LaunchedChunk], result: StepResult) -> None:
        """The state holds the chunks' tokens."""
        if result.scored is not None:
            counts = [c.request.sampling.prompt_logprobs or 0 for c in chunks for _ in c.scored]
            entries = iter(result.scored.messages(counts))
            for chunk in chunks:
                scored = list(itertools.islice(entries, len(chunk.scored)))
                if chunk.request.prompt_logprobs is not None:
                    chunk.request.prompt_logprobs.extend(scored)
        for chunk in chunks:
            request = chunk.request
            self._prompt_tokens += chunk.num_tokens
            if not chunk.completes and request.phase is Phase.PREFILLING and isinstance(request.handoff, SendState):
                self._live.transfers.announce(request, chunk.num_written)

    # Failures

    def _fail_step(self, error: Exception, chunks: Sequence[Chunk | LaunchedChunk]) -> None:
        """Everything that computes fails with the step: nobody knows which states it has written."""
        involved = [*self._rows.requests, *self._live.finishing, *(chunk.request for chunk in chunks)]
        requests = [request for request in dict.fromkeys(involved) if request.phase is not Phase.DONE]
        self._failures_in_a_row += 1
        log.error("step %d failed with %d requests", self._steps, len(requests), exc_info=error)
        for request in requests:
            self._emitter.fail(request, "internal", f"the model failed: {error!r}")
        if self._parallel.size > 1:
            raise EngineError(f"a step failed and the other ranks wait in it: {error!r}") from error
        if self._failures_in_a_row >= self.config.max_step_failures:
            raise EngineError(f"{self._failures_in_a_row} steps in a row failed, the last with {error!r}") from error

    # For operators and tests

    def reset_prefix_cache(self) -> None:
        """Nothing is cached between requests yet: every prompt is computed or received in full."""

    def stats(self) -> EngineStats:
        """A snapshot of gauges and counters."""
        live = self._live
        pages, slots, counters = live.pools.pages, live.pools.slots, live.transfers.counters
        unfinished = (*live.waiting, *live.prefilling)
        return EngineStats(
            rank=self.rank,
            running=len(live.rows) + len(live.prefilling) + len(live.finishing),
            waiting=len(live.waiting),
            receiving=live.transfers.num_receiving,
            held=live.transfers.num_held,
            queued_prompt_tokens=sum(
                request.num_tokens - request.num_computed
                for request in unfinished
                if not isinstance(request.handoff, ReceiveState)
            ),
            pages_total=pages.count,
            pages_free=pages.num_free,
            pages_quarantined=pages.num_used(Use.QUARANTINE),
            slots_total=slots.count,
            slots_free=slots.num_free,
            preemptions=live.num_preempted,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._emitter.num_tokens,
            steps=self._steps,
            transfers_sent=counters.sent,
            transfers_received=counters.received,
            transfers_failed=counters.failed,
            recomputed=self._recomputed,
            bytes_received=counters.bytes_received,
            tokens_asked_for=counters.tokens_asked_for,
            tokens_received=counters.tokens_received,
            queue_time=live.times.queue.counts(),
            prefill_time=live.times.prefill.counts(),
            inference_time=live.times.inference.counts(),
            step_tokens=self._step_tokens.counts(),
            draining=self._draining,
        )

    def check_integrity(self) -> None:
        """Audit of everything between two steps. Raises PoolCorrupted naming requests and ids."""
        self._live.check_integrity()


def _chunk(request: Request, num_tokens: int) -> Chunk:
    scored = range(0)
    if request.prompt_logprobs is not None:
        first = request.num_computed
        scored = range(first, min(first + num_tokens, request.num_prompt - 1))
    return Chunk(request, num_tokens, scored)
