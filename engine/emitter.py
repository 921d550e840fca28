"""What a step or a hand-off has yielded becomes messages: tokens with their endings, and failures of requests."""

import logging

import numpy as np

from engine.connector import FirstToken, Received
from engine.flight import Flight
from engine.intake import EngineShape
from engine.live import LiveRequests
from engine.outbox import Outbox, token_message
from engine.request import Phase, Request
from engine.runner import StepResult
from runtime.requests import Handover, SendState, TokenLogprobs, Tokens

log = logging.getLogger(__name__)


class Emitter:
    """Gives requests their tokens, ends those whose token was the last, and says so in the outbox."""

    def __init__(self, shape: EngineShape, live: LiveRequests, outbox: Outbox) -> None:
        self._shape = shape
        self._live = live
        self._outbox = outbox
        self.num_tokens = 0
        """Tokens that requests were given, those that came with a state included."""

    def emit(self, flight: Flight, result: StepResult) -> None:
        """Append the sampled tokens. Only first and last tokens and grammars are looked at one by one."""
        requests, token_ids = flight.requests, result.token_ids
        tokens = token_ids.tolist()
        outputs: list[Tokens | None] = [
            Tokens(request.request_id, (token_id,)) for request, token_id in zip(requests, tokens, strict=True)
        ]
        for request, token_id in zip(requests, tokens, strict=True):
            request.generated.append(token_id)
        done = Phase.DONE
        for row in [row for row, request in enumerate(requests) if request.phase is done]:
            # It ended while this step was in flight: the token is surplus.
            requests[row].generated.pop()
            outputs[row] = None
        finite = np.isfinite(result.best)
        special = flight.last | flight.has_grammar | ~finite
        for eos_id in self._shape.eos_ids:
            special |= (token_ids == eos_id) & ~flight.ignore_eos
        special[flight.num_decode :] = True
        for row in np.flatnonzero(flight.has_stop_ids).tolist():
            special[row] |= tokens[row] in requests[row].sampling.stop_token_ids
        logprobs: dict[int, TokenLogprobs] = {}
        if result.logprobs is not None:
            wanted = [requests[row].sampling.logprobs or 0 for row in result.logprob_rows]
            logprobs = dict(zip(result.logprob_rows, result.logprobs.messages(wanted), strict=True))
            for row, entry in logprobs.items():
                if outputs[row] is not None:
                    outputs[row] = Tokens(requests[row].request_id, (tokens[row],), (entry,))
        self.num_tokens += len(outputs) - outputs.count(None)
        for row in np.flatnonzero(special).tolist():
            request = requests[row]
            if outputs[row] is None:
                continue
            if finite[row]:
                outputs[row] = self._token(request, logprobs.get(row))
            else:
                request.generated.pop()
                self._fail_choice(request, float(result.best[row]))
                outputs[row] = None
        self._outbox.tokens.extend(filter(None, outputs))

    def join(self, request: Request, event: Received) -> None:
        """A state has arrived with its first token: emit that at once and decode from there."""
        first = event.first
        request.seed = first.seed
        request.cached_tokens = first.cached_tokens
        request.prompt_logprobs = None if first.prompt_logprobs is None else list(first.prompt_logprobs)
        request.generated.append(first.token_id)
        request.enter(Phase.DECODING)
        self.num_tokens += 1
        self._outbox.add(
            Handover(
                request_id=request.request_id,
                num_bytes=event.num_bytes,
                transfer_s=event.transfer_s,
                exposed_s=event.exposed_s,
                wait_s=event.wait_s,
            )
        )
        message = self._token(request, first.logprobs)
        if message is not None:
            self._outbox.tokens.append(message)
        if request.phase is Phase.DECODING:
            row = self._live.enter_rows(request, request.num_tokens - 1)
            self._live.rows.token[row] = first.token_id

    def fail(self, request: Request, kind: str, message: str) -> None:
        """End a request without an answer. kind, message: see `RequestFailed`."""
        self._live.end(request, message)
        self._outbox.fail(request.request_id, kind, message, request.num_emitted)

    def _token(self, request: Request, logprobs: TokenLogprobs | None) -> Tokens | None:
        """The message for a request's newest token; a request that ends with it is gone afterwards.

        None if its grammar cannot follow: the request has failed.
        """
        try:
            reason, stop_id = self._ending(request)
        except Exception as error:
            log.exception("request %s: its grammar failed at token %d", request.request_id, request.generated[-1])
            request.generated.pop()
            self.fail(request, "internal", f"the grammar failed: {error!r}")
            return None
        if isinstance(request.handoff, SendState):
            message = token_message(request, logprobs, reason or "length", stop_id)
            self._hold(request, message, logprobs)
            return message
        message = token_message(request, logprobs, reason, stop_id)
        if reason is not None:
            self._live.end(request, reason)
        elif request.phase is Phase.PREFILLING:
            request.enter(Phase.DECODING)
        return message

    def _ending(self, request: Request) -> tuple[str | None, int | None]:
        """(finish reason, stop id) if the newest token is the last one; the stop id is None for EOS."""
        token_id, sampling = request.generated[-1], request.sampling
        if token_id in self._shape.eos_ids and not sampling.ignore_eos:
            return "stop", None
        if token_id in sampling.stop_token_ids:
            return "stop", token_id
        if request.matcher is not None:
            request.matcher.accept(token_id)
            if request.matcher.is_done:
                return "stop", None
        if len(request.generated) >= self._live.max_generated(request):
            return "length", None
        return None, None

    def _hold(self, request: Request, message: Tokens, logprobs: TokenLogprobs | None) -> None:
        """A prefill for another rank is done: its first token goes with its state."""
        first = FirstToken(
            token_id=request.generated[-1],
            logprobs=logprobs,
            seed=request.seed,
            prompt_tokens=request.num_prompt,
            cached_tokens=request.cached_tokens,
            prompt_logprobs=message.prompt_logprobs,
        )
        self._live.hold(request, first)

    def _fail_choice(self, request: Request, best: float) -> None:
        if best == float("-inf"):
            self.fail(request, "invalid", "no token satisfies grammar, allowed ids, bad words and min_tokens together")
        else:
            self.fail(request, "internal", f"the model's logits are not finite after {request.num_tokens} tokens")
