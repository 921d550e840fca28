"""The life of one request: pick two ranks, send both legs, relay the answer, and end the transfer on every way out."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from router.answer import KEEP_ALIVE, Answer, Verdict, WholeEvents
from router.config import RouterConfig
from router.errors import RouteError, error_answer, error_event, refusal_event
from router.health import Proofs
from router.http1 import ResponseHead
from router.legs import LegFactory
from router.metrics import RouterMetrics
from router.picker import Pair, Picker
from router.recovery import Facts, Failure, Step, decide
from router.registry import Registry, Target
from router.request import Request
from router.resume import has_ended, progress_of
from router.sink import ClientGone, Headers, Sink
from router.transfers import Transfer, TransferTable
from router.usage import corrected, corrected_events, usage_of
from runtime.errors import TandemError

log = logging.getLogger(__name__)

_NOT_RELAYED = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"transfer-encoding",
        b"content-length",
        b"server",
        b"date",
        b"x-request-id",
        b"x-tandem-created",
    )
)


class Wakeup:
    """Says that something changed. One waiter."""

    __slots__ = ("_loop", "_set", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        if not self._set:
            self._waiter = self._loop.create_future()
            await self._waiter
        self._set = False


class Dispatcher:
    """What all requests share."""

    def __init__(
        self,
        config: RouterConfig,
        registry: Registry,
        picker: Picker,
        legs: LegFactory,
        transfers: TransferTable,
        metrics: RouterMetrics,
        proofs: Proofs,
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self.registry = registry
        self.picker = picker
        self.legs = legs
        self.transfers = transfers
        self.metrics = metrics
        self.proofs = proofs
        self.clock = clock
        self.on_load_failure: list[Callable[[], None]] = []
        """Called when a decode node answered with an error that may be about the state it could not get."""
        self.live: set[int] = set()
        """Numbers of the requests being served."""

    async def serve(self, request: Request, sink: Sink, pair: Pair | None = None) -> None:
        """Answer `request` into `sink`, through `pair` if given (then in one attempt).

        Raises ClientGone when the client left. Cancelling it cancels both legs and releases the transfer.
        """
        job = _Job(self, request, sink, pair)
        self.live.add(request.number)
        try:
            await job.run()
        finally:
            job.close()
            self.live.discard(request.number)


class _Job:
    """One request under way. Owns its legs and its transfer."""

    def __init__(self, shared: Dispatcher, request: Request, sink: Sink, pair: Pair | None) -> None:
        self._shared = shared
        self._request = request
        self._sink = sink
        self._fixed = pair
        self._started_at = shared.clock()
        self._turn = shared.picker.turn() if pair is None else 0
        self._wake = Wakeup()
        self._decode_target: Target | None = None
        self._prefill: Answer | None = None
        self._decode: Answer | None = None
        self._transfer: Transfer | None = None
        self._usage: dict[str, Any] | None = None
        """What prefill counted, where decode cannot know it."""
        self._prefill_ok = False
        self._prefill_sent_at = 0.0
        self._prefilled_at = 0.0
        self._avoid: list[Target] = []
        self._num_resumes = 0
        self._end = "the router gave up"

    async def run(self) -> None:
        request, sink, shared = self._request, self._sink, self._shared
        attempt = 1
        try:
            self._start(self._fixed or shared.picker.pair(request, self._turn))
            while True:
                outcome = await self._await_answer()
                if isinstance(outcome, Failure):
                    await self._recover(outcome, attempt)
                    attempt += 1
                elif await self._deliver(outcome):
                    return
                else:
                    await self._resume(outcome)
                    attempt = 1
        except TandemError as error:
            self._end = str(error)
            shared.metrics.failed(error)
            if sink.started:
                shared.metrics.broken_streams.inc()
                await sink.write(error_event(error, request.path))
                await sink.finish()
            else:
                await sink.answer(*error_answer(error, request.path))
        except ClientGone:
            self._end = "the client left"
            raise
        except asyncio.CancelledError:
            self._end = "the client left, or the router stops"
            raise

    def close(self) -> None:
        """On every way out: cancel what still runs, and end the transfer."""
        for answer in (self._prefill, self._decode):
            if answer is not None:
                answer.leg.close()
        self._end_transfer(self._end)

    # Sending

    def _start(self, pair: Pair) -> None:
        """Send the legs of a new transfer; with sequential dispatch, the first of them."""
        shared, request = self._shared, self._request
        self._prefill = self._decode = None
        self._prefill_ok = False
        self._usage = None
        self._decode_target = pair.decode
        if pair.prefill is not None:
            self._transfer = shared.transfers.open(request.number, request.request_id, pair.prefill, request.choices)
            self._prefill_sent_at = shared.clock()
            self._prefill = Answer(shared.legs.prefill(request, self._transfer, self._wake.set))
            if not shared.config.concurrent:
                return
        self._send_decode(pair.decode)

    def _send_decode(self, target: Target) -> None:
        self._decode_target = target
        self._decode = Answer(self._shared.legs.decode(self._request, target, self._transfer, self._wake.set))

    def _end_transfer(self, reason: str) -> None:
        if self._transfer is not None and self._transfer.end is None:
            self._shared.transfers.release(self._transfer, reason)

    # Waiting

    async def _await_answer(self) -> Answer | Failure:
        """Wait until decode has a good answer, or either leg a refusal (both go to the client), or a leg failed."""
        while True:
            verdict = Verdict.WAITING if self._decode is None else self._decode.look()
            if verdict is Verdict.GOOD or verdict is Verdict.REFUSED:
                assert self._decode is not None
                return self._decode
            outcome = self._look_at_prefill()
            if outcome is not None:
                return outcome
            if verdict is Verdict.FAILED:
                assert self._decode is not None
                assert self._decode.failure is not None
                return self._decode.failure
            if verdict is Verdict.KEEP_ALIVE:
                await self._keep_alive()
            await self._wake.wait()

    def _look_at_prefill(self) -> Answer | Failure | None:
        """The prefill leg's refusal or failure. Its success starts the decode leg where that comes second."""
        if self._prefill is None or self._prefill_ok:
            return None
        verdict = self._prefill.look()
        if verdict is Verdict.REFUSED:
            return self._prefill
        if verdict is Verdict.FAILED:
            return self._prefill.failure
        if verdict is Verdict.GOOD:
            self._prefill_ok = True
            if self._transfer is not None:
                self._transfer.computed = True
            if self._prefill.leg.target.node.info.dialect == "vllm":
                self._usage = usage_of(self._prefill.data)
            self._prefilled_at = self._shared.clock()
            self._shared.metrics.prefill_seconds.observe(self._prefilled_at - self._prefill_sent_at)
            self._prefill.leg.close()
            if self._decode is None:
                assert self._decode_target is not None
                self._send_decode(self._decode_target)
        return None

    async def _keep_alive(self) -> None:
        """Tell a client that waits for a long prompt that somebody is there. Commits to a stream, not to a node."""
        assert self._decode is not None
        if not self._sink.started:
            await self._sink.start(self._decode.head.status, self._headers(self._decode.head))
        await self._sink.write(KEEP_ALIVE)

    # Failing over

    async def _recover(self, failure: Failure, attempt: int) -> None:
        """Send what replaces the failed leg, or raise what the client gets."""
        shared, config = self._shared, self._shared.config.requests
        failed = self._prefill if failure.leg == "prefill" else self._decode
        assert failed is not None
        target = failed.leg.target
        if failure.says_node_is_bad:
            shared.registry.suspect(target.node, shared.clock() + config.suspect_s)
        other = None
        if failure.leg == "decode" and self._transfer is not None:
            known = [*self._avoid, *self._transfer.decodes]
            other = shared.picker.other_decode(self._request, self._turn, known)
        facts = Facts(
            attempt=attempt,
            max_attempts=1 if self._fixed is not None else config.max_attempts,
            recompute=config.kv_load_failure_policy == "recompute",
            state_held=self._state_held(failed),
            other_decode=other is not None,
        )
        step = decide(failure, facts)
        log.warning("request %s, attempt %d: %s; %s", self._request.request_id, attempt, failure, step.value)
        shared.metrics.retries.labels(failure.leg, step.value).inc()
        if step is Step.GIVE_UP:
            raise failure.as_error()
        self._avoid.append(target)
        if step is Step.OTHER_DECODE:
            assert other is not None
            failed.leg.close()
            self._send_decode(other)
            return
        if failure.leg == "decode" and failure.status and self._prefill is not None:
            # Its error may be about the state it could not get.
            for listener in shared.on_load_failure:
                listener()
            self._avoid.append(self._prefill.leg.target)
        self._abandon(str(failure))
        await self._start_again(attempt)

    def _abandon(self, reason: str) -> None:
        """Give up both legs and their transfer: others will replace them."""
        for answer in (self._prefill, self._decode):
            if answer is not None:
                answer.leg.close()
        self._end_transfer(reason)
        self._transfer = None

    async def _resume(self, broken: Answer) -> None:
        """Have a stream that broke in the middle continued elsewhere, or raise what ends it."""
        shared, request, leg = self._shared, self._request, broken.leg
        error = leg.exchange.error
        shared.registry.suspect(leg.target.node, shared.clock() + shared.config.requests.suspect_s)
        progress = progress_of(leg.exchange, request.progress) if request.resumable else None
        if progress is None or self._fixed is not None or self._num_resumes >= shared.config.requests.max_resumes:
            log.warning("request %s: the stream broke: %s", request.request_id, error)
            raise RouteError("The decode node failed in the middle of this answer.", status=502, code="stream_broken")
        self._num_resumes += 1
        shared.metrics.resumes.inc()
        log.warning(
            "request %s: the stream broke after %d tokens: %s; continuing elsewhere (%d of %d)",
            request.request_id,
            len(progress.token_ids),
            error,
            self._num_resumes,
            shared.config.requests.max_resumes,
        )
        request.progress = progress
        self._avoid.append(leg.target)
        self._abandon(f"the stream broke: {error}")
        await self._start_again(attempt=1)

    async def _start_again(self, attempt: int) -> None:
        config = self._shared.config.requests
        last = attempt + 1 == config.max_attempts
        pair = await self._pick_again(local=last)
        if pair.prefill in self._avoid or pair.decode in self._avoid:
            await asyncio.sleep(config.retry_backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            pair = await self._pick_again(local=last)
        self._start(pair)

    async def _pick_again(self, *, local: bool) -> Pair:
        """A pair for another try. If nobody is there, wait a little: a node that just fell away is often soon back."""
        shared = self._shared
        give_up_at = shared.clock() + shared.config.requests.wait_for_node_s
        while True:
            try:
                return shared.picker.pair(self._request, self._turn, self._avoid, local=local)
            except RouteError:
                if shared.clock() >= give_up_at:
                    raise
            await asyncio.sleep(0.05)

    def _state_held(self, failed: Answer) -> bool:
        """Whether another decode rank could still claim what the prefill rank computed or computes."""
        if self._transfer is None or self._transfer.prefill.node.lost is not None:
            return False
        head = failed.leg.exchange.head
        if failed.leg.kind == "decode" and head is not None and head.status // 100 == 2 and not failed.streamed:
            # It began to answer, so it has fetched the state.
            return False
        if not self._prefill_ok:
            return self._prefill is not None and self._prefill.failure is None
        return self._shared.clock() - self._prefilled_at < self._shared.config.deadlines.state_hold_s

    # Answering

    async def _deliver(self, answer: Answer) -> bool:
        """Give the client what `answer` holds, and what follows if it is a stream. False: the stream broke."""
        shared, sink = self._shared, self._sink
        status, headers = answer.head.status, self._headers(answer.head)
        if status // 100 != 2:
            self._end = f"the {answer.leg.kind} node refused the request ({status})"
            if sink.started:
                await sink.write(refusal_event(answer.data, self._request.path))
                await sink.finish()
            else:
                await sink.answer(status, headers, answer.data)
            return True
        now = shared.clock()
        self._proven(answer, now)
        if not answer.streamed:
            data = answer.data if self._usage is None else corrected(answer.data, self._usage)
            await sink.answer(status, headers, data)
            return True
        if not self._num_resumes:
            shared.metrics.ttft.observe(now - self._started_at)
        if not sink.started:
            await sink.start(status, headers)
        return await self._relay(answer)

    def _proven(self, answer: Answer, now: float) -> None:
        """The decode rank answered with a token: the state arrived, prefill has let go."""
        shared, leg = self._shared, answer.leg
        way = answer.head.get(b"x-tandem-path")
        if self._transfer is None:
            way = b"local"
            shared.proofs.record(None, leg.target, now)
        else:
            if self._transfer.choices == 1 or not answer.streamed:
                self._finish_transfer(now)
            if way not in shared.metrics.ways:
                way = b"handoff"
            if way == b"handoff":
                shared.proofs.record(self._transfer.prefill, leg.target, now)
        shared.metrics.ways[way].inc()

    def _finish_transfer(self, now: float) -> None:
        """Every choice has its state. Prefill's own answer may be a moment behind."""
        assert self._transfer is not None
        self._shared.transfers.finish(self._transfer)
        if self._prefill is not None and not self._prefill_ok:
            self._prefill.leg.let_finish(now)
            self._prefill = None

    async def _relay(self, answer: Answer) -> bool:
        """Pass the stream on as it comes, in whole events. False: it broke before its end."""
        leg, sink = answer.leg, self._sink
        exchange, events, usage = leg.exchange, WholeEvents(), self._usage

        def cut(data: bytes) -> bytes:
            whole = events.cut(data)
            return whole if usage is None else corrected_events(whole, usage)

        def pass_on(data: bytes) -> bool:
            """For whole events that come while nobody waits for anything: no task is woken for them."""
            return data.endswith(b"\n\n") and events.empty and usage is None and sink.write_now(data)

        leg.begin_stream()
        data = answer.data
        exchange.relay_to(pass_on, sink.write_chunk if usage is None else None)
        while True:
            if data:
                if whole := cut(data):
                    # A client that reads slowly is not the node's fault: no deadline runs while we wait for it.
                    leg.expect_nothing()
                    await sink.write(whole)
                    leg.expect_more(self._shared.clock())
            elif exchange.complete or (exchange.error is not None and has_ended(exchange)):
                break
            elif exchange.error is not None:
                return False
            else:
                await self._wake.wait()
            data = exchange.take()
        if self._transfer is not None and self._transfer.end is None:
            # Several choices: the first event came from one of them, only the end says that all had their state.
            self._finish_transfer(self._shared.clock())
        if rest := events.rest():
            await sink.write(rest)
        await sink.finish()
        return True

    def _headers(self, head: ResponseHead) -> Headers:
        """What of the node's headers is the client's business."""
        return [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in head.headers
            if name not in _NOT_RELAYED
        ]
