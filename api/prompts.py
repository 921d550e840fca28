"""Prompts to token ids, off the event loop when they are long; what cannot fit is refused before it is encoded."""

from collections.abc import Sequence

from api.chat import RenderedPrompt
from api.context import Context
from api.encoding.segments import Segments
from api.sampling import check_token_ids, context_exceeded
from api.schema import SamplingBody
from runtime.errors import RequestError
from runtime.token_ids import TokenIds


async def encode_text(context: Context, text: str, body: SamplingBody, *, segments: Segments | None = None) -> TokenIds:
    """A raw prompt, in which control tokens may be spelled out; or, for fill in the middle, its segments."""
    given = given_ids(context, body)
    if given is not None:
        return given
    _refuse_hopeless(context, len(text), body, "prompt")
    if segments is not None:
        return await context.tokenizer.encode_async(segments)
    return await context.tokenizer.encode_text_async(text)


async def encode_rendered(context: Context, rendered: RenderedPrompt, body: SamplingBody) -> TokenIds:
    """A rendered chat."""
    given = given_ids(context, body)
    if given is not None:
        return given
    _refuse_hopeless(context, sum(len(segment.text) for segment in rendered.segments), body, "messages")
    return await context.tokenizer.encode_async(rendered.segments)


def given_ids(context: Context, body: SamplingBody) -> TokenIds | None:
    """The prompt as the prefill leg encoded it, where a router passes it on."""
    params = body.kv_transfer_params
    if params is None or params.prompt_token_ids is None:
        return None
    ids: Sequence[int] = params.prompt_token_ids
    param = "kv_transfer_params.prompt_token_ids"
    if not ids:
        raise RequestError(f"{param}: must not be empty", param=param)
    check_token_ids(ids, param, context.limits.vocab_size)
    return TokenIds(ids)


def _refuse_hopeless(context: Context, num_chars: int, body: SamplingBody, param: str) -> None:
    """No token stands for more bytes than the longest one, which bounds the length from below without encoding."""
    least = num_chars // context.longest_token_bytes
    if least >= context.info.max_model_len and body.truncate_prompt_tokens is None:
        raise context_exceeded(f"has at least {least} tokens", context.info.max_model_len, param)
