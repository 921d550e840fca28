"""POST /v1/completions: text or token ids in, text out; several prompts, n, echo, logprobs, fill in the middle."""

from collections.abc import Sequence

from aiohttp import web

from api.body import decode
from api.chat import render_fim
from api.completion_format import CompletionResponse, CompletionShape
from api.constraints import check_formats, completion_constraint
from api.context import CONTEXT, REQUEST_ID, Context
from api.handoff import first_token_body, leg_of
from api.logprobs import TokenNames
from api.prompts import encode_text
from api.respond import now, respond
from api.sampling import LogprobsWanted, check, check_logprobs, check_max_tokens, check_token_ids, stop_strings
from api.schema import CompletionBody
from api.submission import build_submission, response_id, truncated
from api.text_output import TextOutput, TextRules
from runtime.errors import RequestError
from runtime.token_ids import TokenIds

DEFAULT_MAX_TOKENS = 16


async def completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    context = request.app[CONTEXT]
    arrived = now()
    body = decode(await request.read(), CompletionBody)
    with context.limiter.slot():
        return await answer(request, body, arrived)


async def answer(request: web.Request, body: CompletionBody, arrived: float) -> web.StreamResponse:
    """Check, encode, generate, respond."""
    context = request.app[CONTEXT]
    model = context.model_of(body.model)
    leg = leg_of(body.kv_transfer_params, context.info)
    if leg.kind == "prefill":
        body = first_token_body(body)
    prompts = check_completion(body, context)
    echo = bool(body.echo) and leg.kind != "prefill"
    prompt_only = echo and body.max_tokens == 0
    wanted = LogprobsWanted(sample=_num_logprobs(body), prompt=_num_prompt_logprobs(body))
    constraint = await completion_constraint(context, body)
    texts_or_ids = [await encode_prompt(context, prompt, body) for prompt in prompts]
    submission = await build_submission(
        context,
        body,
        response_id=response_id("cmpl-", body.request_id, request[REQUEST_ID]),
        prompts=texts_or_ids,
        prompt_param="prompt",
        leg=leg,
        wanted=wanted,
        max_tokens=1 if prompt_only else body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        constraint=constraint,
    )
    shape = CompletionShape(
        response_id=submission.response_id,
        created=submission.created,
        model=model,
        names=TokenNames(context.tokenizer, as_ids=bool(body.return_tokens_as_token_ids)),
        num_logprobs=wanted.sample,
        num_prompt_logprobs=wanted.prompt,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        continuous_usage=bool(body.stream_options and body.stream_options.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        prompt_only=prompt_only,
    )
    echo_texts: list[str | None] = [None] * len(submission.submits)
    if echo:
        echo_texts = [context.tokenizer.decode(submit.prompt_ids) for submit in submission.submits]
    rules = TextRules(
        stops=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        skip_special=body.skip_special_tokens is not False,
    )
    return await respond(
        request,
        submission,
        [TextOutput(context.tokenizer, rules) for _ in submission.submits],
        lambda reader: CompletionResponse(reader, submission.submits, echo_texts, shape),
        stream=bool(body.stream),
        arrived=arrived,
    )


def check_completion(body: CompletionBody, context: Context) -> Sequence[str | Sequence[int]]:
    """Refuse what is out of range. Returns the prompts, one per group of choices."""
    limits = context.limits
    check(body, limits)
    check_max_tokens(body.max_tokens, "max_tokens", body.min_tokens, least=0 if body.echo else 1)
    check_logprobs(_num_logprobs(body), "logprobs", limits)
    check_logprobs(body.prompt_logprobs, "prompt_logprobs", limits)
    check_formats(body)
    prompts = split_prompts(body.prompt)
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_token_ids(prompt, "prompt", limits.vocab_size)
    if len(prompts) * (body.n or 1) > limits.max_choices:
        raise RequestError(
            f"prompt: {len(prompts)} prompts with n={body.n or 1} are more than {limits.max_choices} choices",
            param="prompt",
        )
    if body.suffix is not None and (body.echo or not all(isinstance(prompt, str) for prompt in prompts)):
        raise RequestError("suffix: needs a text prompt, and excludes echo", param="suffix")
    return prompts


def split_prompts(prompt: str | list[int | str | list[int]] | None) -> Sequence[str | Sequence[int]]:
    """The four forms of `prompt`: a text, texts, token ids, lists of token ids. Raises RequestError."""
    if prompt is None or prompt == [] or prompt == "":
        raise RequestError("prompt: this field is required and must not be empty", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if len(kinds) > 1:
        raise RequestError("prompt: must be a text, a list of texts, token ids, or lists of token ids", param="prompt")
    if kinds == {int}:
        return [prompt]  # type: ignore[list-item]
    for index, item in enumerate(prompt):
        if not item:
            raise RequestError(f"prompt.{index}: must not be empty", param="prompt")
    return prompt  # type: ignore[return-value]


def _num_logprobs(body: CompletionBody) -> int | None:
    """`true` means one, `false` none."""
    if isinstance(body.logprobs, bool):
        return 1 if body.logprobs else None
    return body.logprobs


def _num_prompt_logprobs(body: CompletionBody) -> int | None:
    """An echoed prompt is listed with the logprobs that were asked for."""
    if body.prompt_logprobs is None and body.echo:
        return _num_logprobs(body)
    return body.prompt_logprobs


async def encode_prompt(context: Context, prompt: str | Sequence[int], body: CompletionBody) -> TokenIds:
    """The ids of one prompt. Raises RequestError."""
    max_model_len = context.info.max_model_len
    if not isinstance(prompt, str):
        return truncated(prompt, body, max_model_len)
    segments = None if body.suffix is None else render_fim(prompt, body.suffix)
    ids = await encode_text(context, prompt, body, segments=segments)
    if not ids:
        raise RequestError("prompt: has no tokens", param="prompt")
    return truncated(ids, body, max_model_len)
