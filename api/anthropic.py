"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API in front of the same chats."""

from aiohttp import web

from api.anthropic_format import MessagesResponse, MessagesShape
from api.anthropic_request import to_chat
from api.anthropic_schema import CountBody, MessagesBody
from api.body import decode
from api.chat_request import chat_outputs, check_chat, prepare_chat, render
from api.context import CONTEXT, REQUEST_ID
from api.field_names import renamed_fields
from api.jsonio import json_response
from api.parse_events import StartState
from api.prompts import encode_rendered
from api.respond import now, respond

FIELD_NAMES = {
    "reasoning_effort": "output_config.effort",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}
"""A chat's fields as callers of this API know them."""


async def messages(request: web.Request) -> web.StreamResponse:
    """The handler of /v1/messages."""
    context = request.app[CONTEXT]
    arrived = now()
    body = decode(await request.read(), MessagesBody)
    with context.limiter.slot():
        chat, places = to_chat(body)
        with renamed_fields(FIELD_NAMES, places):
            prepared = await prepare_chat(request, chat, response_id=f"msg_{request[REQUEST_ID]}")
        shape = MessagesShape(
            response_id=prepared.submission.response_id,
            model=prepared.model,
            parallel_tool_calls=prepared.body.parallel_tool_calls is not False,
            thinks=prepared.rendered.start.state is StartState.REASONING,
        )
        return await respond(
            request,
            prepared.submission,
            chat_outputs(context, prepared),
            lambda reader: MessagesResponse(reader, shape),
            stream=bool(prepared.body.stream),
            arrived=arrived,
            headers=prepared.headers,
        )


async def count_tokens(request: web.Request) -> web.Response:
    """How many tokens the prompt of these messages has."""
    context = request.app[CONTEXT]
    chat, places = to_chat(decode(await request.read(), CountBody))
    context.model_of(chat.model)
    with renamed_fields(FIELD_NAMES, places):
        check_chat(chat, context)
        ids = await encode_rendered(context, render(chat, context), chat)
    return json_response({"input_tokens": len(ids)})
