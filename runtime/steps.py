"""Steps that came while their reader was busy, as one: each request's tokens side by side, so that they leave together.

A process that is late catches up this way, because several tokens of one stream cost hardly more than one.
"""

from collections.abc import Iterable, Iterator

from runtime.requests import FromEngine, StepOutput, Tokens


def joined(messages: Iterable[FromEngine]) -> Iterator[FromEngine]:
    """The messages in their order, with each run of steps made one step that brings all of their tokens."""
    steps: list[StepOutput] = []
    for message in messages:
        if isinstance(message, StepOutput):
            steps.append(message)
            continue
        if steps:
            yield _as_one(steps)
            steps = []
        yield message
    if steps:
        yield _as_one(steps)


def _as_one(steps: list[StepOutput]) -> StepOutput:
    if len(steps) == 1:
        return steps[0]
    together: dict[str, Tokens] = {}
    for step in steps:
        for tokens in step.outputs:
            earlier = together.get(tokens.request_id)
            together[tokens.request_id] = tokens if earlier is None else _followed(earlier, tokens)
    return StepOutput(tuple(together.values()))


def _followed(earlier: Tokens, later: Tokens) -> Tokens:
    """Two steps of one request: what a step says of the prompt counts whichever says it, the end is the later one's."""
    return Tokens(
        request_id=later.request_id,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
        finish_reason=later.finish_reason,
        stop_token_id=later.stop_token_id,
        prompt_tokens=later.prompt_tokens or earlier.prompt_tokens,
        cached_tokens=max(later.cached_tokens, earlier.cached_tokens),
        prompt_logprobs=later.prompt_logprobs if earlier.prompt_logprobs is None else earlier.prompt_logprobs,
    )
