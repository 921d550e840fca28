"""What the engine has to say after a step, in the order in which the API process must hear it."""

import logging

from engine.request import Request
from runtime.requests import FromEngine, RequestFailed, StepOutput, TokenLogprobs, Tokens

log = logging.getLogger(__name__)


class Outbox:
    """Collects messages; `take` hands them over: events first, then all tokens of the step as one message."""

    def __init__(self) -> None:
        self._messages: list[FromEngine] = []
        self.tokens: list[Tokens] = []

    def __bool__(self) -> bool:
        return bool(self._messages or self.tokens)

    def add(self, message: FromEngine) -> None:
        self._messages.append(message)

    def fail(self, request_id: str, kind: str, message: str, tokens_emitted: int = 0) -> None:
        """This request ends without an answer."""
        # What it said before must be heard before.
        self._flush_tokens()
        log.warning("request %s failed (%s): %s", request_id, kind, message)
        self._messages.append(
            RequestFailed(request_id=request_id, kind=kind, message=message, tokens_emitted=tokens_emitted)
        )

    def take(self) -> list[FromEngine]:
        self._flush_tokens()
        messages, self._messages = self._messages, []
        return messages

    def _flush_tokens(self) -> None:
        if self.tokens:
            self._messages.append(StepOutput(tuple(self.tokens)))
            self.tokens = []


def token_message(
    request: Request, logprobs: TokenLogprobs | None, finish_reason: str | None, stop_token_id: int | None
) -> Tokens:
    """The newest token of a request. Counts of the prompt come with the first and the last one."""
    first = request.num_emitted == 1
    prompt_logprobs = None
    if first and request.prompt_logprobs is not None:
        prompt_logprobs = tuple(request.prompt_logprobs)
        request.prompt_logprobs = None
    counts = first or finish_reason is not None
    return Tokens(
        request.request_id,
        (request.generated[-1],),
        () if logprobs is None else (logprobs,),
        finish_reason,
        stop_token_id,
        request.num_prompt if counts else 0,
        request.cached_tokens if counts else 0,
        prompt_logprobs,
    )
