"""What a prompt becomes, without generating: /tokenize, /detokenize and the render endpoints.

They encode with the very functions that generation uses, so that counts and ids agree with it.
"""

from typing import Any

import msgspec
from aiohttp import web

from api.body import decode
from api.chat_request import check_chat, render
from api.context import CONTEXT, REQUEST_ID, Context
from api.jsonio import json_response
from api.openai_completions import check_completion, encode_prompt
from api.prompts import encode_rendered
from api.sampling import check_token_ids
from api.schema import ChatBody, CompletionBody
from runtime.errors import RequestError
from runtime.token_ids import TokenIds


class TokenizeBody(ChatBody, frozen=True, kw_only=True):
    """POST /tokenize: a text, or a chat."""

    messages: list[dict[str, Any]] | None = None  # type: ignore[assignment]
    prompt: str | None = None
    add_special_tokens: bool | None = None
    """Accepted and without effect: this tokenizer adds none."""
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


async def tokenize(request: web.Request) -> web.Response:
    """Ids of a text in which control tokens may be spelled out, or of a chat's prompt."""
    context = request.app[CONTEXT]
    body = decode(await request.read(), TokenizeBody)
    context.model_of(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: either prompt or messages is needed", param="prompt")
    if body.prompt is not None:
        ids = await context.tokenizer.encode_text_async(body.prompt)
    else:
        ids = await _chat_ids(body, context)
    strings = [context.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return json_response(
        {"count": len(ids), "max_model_len": context.info.max_model_len, "tokens": list(ids), "token_strs": strings}
    )


async def detokenize(request: web.Request) -> web.Response:
    """The text of ids, control tokens spelled out."""
    context = request.app[CONTEXT]
    body = decode(await request.read(), DetokenizeBody)
    context.model_of(body.model)
    check_token_ids(body.tokens, "tokens", context.limits.vocab_size)
    return json_response({"prompt": context.tokenizer.decode(body.tokens, skip_special=False)})


async def render_chat_prompt(request: web.Request) -> web.Response:
    """The ids that this chat would be generated from."""
    context = request.app[CONTEXT]
    body = decode(await request.read(), ChatBody)
    model = context.model_of(body.model)
    ids = await _chat_ids(body, context)
    return json_response(_rendered(f"chatcmpl-{request[REQUEST_ID]}", model, ids))


async def render_completion_prompts(request: web.Request) -> web.Response:
    """The ids that each prompt of this completion would be generated from."""
    context = request.app[CONTEXT]
    body = decode(await request.read(), CompletionBody)
    model = context.model_of(body.model)
    prompts = [await encode_prompt(context, prompt, body) for prompt in check_completion(body, context)]
    return json_response(
        [_rendered(f"cmpl-{request[REQUEST_ID]}-{index}", model, ids) for index, ids in enumerate(prompts)]
    )


async def _chat_ids(body: ChatBody, context: Context) -> TokenIds:
    check_chat(body, context)
    return await encode_rendered(context, render(body, context), body)


def _rendered(request_id: str, model: str, ids: TokenIds) -> dict[str, Any]:
    return {"request_id": request_id, "model": model, "token_ids": list(ids), "count": len(ids)}
