"""A validated request to what the engine is asked: one `Submit` per choice."""

import asyncio
import uuid
from collections.abc import Sequence

import msgspec

from api.context import Context
from api.handoff import Leg
from api.sampling import LogprobsWanted, bad_words, resolve_max_tokens, sampling_params
from api.schema import SamplingBody
from runtime.errors import RequestError
from runtime.requests import Submit
from runtime.token_ids import TokenIds


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """What is generated for one HTTP request. Choices are numbered prompt by prompt."""

    response_id: str
    submits: tuple[Submit, ...]
    choices_per_prompt: int
    created: int
    """Unix time of the request; of a resumed stream, of its beginning."""

    @property
    def num_prompt_tokens(self) -> list[int]:
        return [len(submit.prompt_ids) for submit in self.submits[:: self.choices_per_prompt]]


def response_id(prefix: str, asked: str | None, header: str) -> str:
    """`chatcmpl-<id>`, where the id is the one of the body, else the one of the request."""
    base = asked or header
    return base if base.startswith(prefix) else prefix + base


def truncated(ids: Sequence[int], body: SamplingBody, max_model_len: int) -> TokenIds:
    """The prompt, or its last `truncate_prompt_tokens` tokens (-1: as many as leave room for one more).

    Both legs of a disaggregated request must come to the same prompt, so nothing else of the body may matter here.
    """
    keep = body.truncate_prompt_tokens
    if keep is None:
        return TokenIds(ids)
    return TokenIds(ids[-(keep if keep > 0 else max(1, max_model_len - 1)) :])


async def build_submission(
    context: Context,
    body: SamplingBody,
    *,
    response_id: str,
    prompts: Sequence[TokenIds],
    prompt_param: str,
    leg: Leg,
    wanted: LogprobsWanted,
    max_tokens: int | None,
    max_tokens_param: str = "max_tokens",
    default_max_tokens: int | None = None,
    constraint: bytes | None = None,
) -> Submission:
    """Resolve everything that depends on the prompts. Raises RequestError before anything is submitted."""
    words = body.bad_words or ()
    bad_word_ids = await asyncio.to_thread(bad_words, words, context.tokenizer) if words else ()
    choices = body.n or 1
    num_choices = len(prompts) * choices
    if leg.generated_ids and num_choices > 1:
        raise RequestError(f"n: a stream with {num_choices} choices cannot be resumed", param="n")
    if leg.generated_ids and wanted.prompt is not None:
        # They came with the first event, before the stream broke.
        wanted = msgspec.structs.replace(wanted, prompt=None)
    # Two live requests may carry the same id; inside the engine each has its own.
    unique = f"{response_id}-{uuid.uuid4().hex[:8]}"
    submits = []
    for prompt, ids in enumerate(prompts):
        limit = resolve_max_tokens(
            max_tokens,
            len(ids),
            context.info.max_model_len,
            default=default_max_tokens,
            param=max_tokens_param,
            prompt_param=prompt_param,
        )
        for choice in range(choices):
            number = prompt * choices + choice
            submits.append(
                Submit(
                    request_id=f"{unique}-{number}",
                    prompt_ids=ids,
                    sampling=sampling_params(
                        body,
                        vocab_size=context.info.vocab_size,
                        max_tokens=limit,
                        wanted=wanted,
                        bad_word_ids=bad_word_ids,
                        choice=choice,
                        constraint=constraint,
                    ),
                    handoff=leg.handoff(number, num_choices),
                    generated_ids=leg.generated_ids,
                    priority=body.priority or 0,
                )
            )
    return Submission(
        response_id=response_id,
        submits=tuple(submits),
        choices_per_prompt=choices,
        created=context.unix_time() if leg.created is None else leg.created,
    )
