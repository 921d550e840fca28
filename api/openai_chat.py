"""POST /v1/chat/completions."""

from aiohttp import web

from api.body import decode
from api.chat_format import ChatResponse, ChatShape
from api.chat_request import PreparedChat, chat_outputs, num_logprobs, prepare_chat
from api.context import CONTEXT, REQUEST_ID, Context
from api.logprobs import TokenNames
from api.respond import now, respond
from api.schema import ChatBody, NamedToolChoice
from api.submission import response_id


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    context = request.app[CONTEXT]
    arrived = now()
    body = decode(await request.read(), ChatBody)
    with context.limiter.slot():
        prepared = await prepare_chat(
            request, body, response_id=response_id("chatcmpl-", body.request_id, request[REQUEST_ID])
        )
        shape = chat_shape(prepared, context)
        return await respond(
            request,
            prepared.submission,
            chat_outputs(context, prepared),
            lambda reader: ChatResponse(reader, prepared.submission.submits, shape),
            stream=bool(prepared.body.stream),
            arrived=arrived,
            headers=prepared.headers,
        )


def chat_shape(prepared: PreparedChat, context: Context) -> ChatShape:
    """What the caller of a chat wants to see."""
    body = prepared.body
    options = body.stream_options
    return ChatShape(
        response_id=prepared.submission.response_id,
        created=prepared.submission.created,
        model=prepared.model,
        names=TokenNames(context.tokenizer, as_ids=bool(body.return_tokens_as_token_ids)),
        reasoning_fields=context.settings.reasoning_fields,
        include_reasoning=body.include_reasoning is not False,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        named_tool=isinstance(body.tool_choice, NamedToolChoice),
        num_logprobs=num_logprobs(body),
        num_prompt_logprobs=body.prompt_logprobs,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        prompt_text=prepared.rendered.text if body.return_prompt_text else None,
    )
