"""/v1/responses: OpenAI's Responses API in front of the same chats, with a bounded memory for follow-ups."""

from typing import Any

from aiohttp import web

from api.body import decode
from api.chat_request import WARNING_HEADER, chat_outputs, check_chat, prepare_chat, render
from api.content_logprobs import ContentLogprobs
from api.context import CONTEXT, Context
from api.field_names import renamed_fields
from api.jsonio import json_response
from api.logprobs import TokenNames
from api.prompts import encode_rendered
from api.respond import now, respond
from api.response_ids import new_response_id
from api.response_store import Items
from api.responses_format import ResponsesResponse, ResponsesShape
from api.responses_request import Conversation, input_items, to_chat
from api.responses_schema import InputBody, ResponsesBody
from api.responses_stored import find_item, stored
from api.responses_tools import ToolTable
from api.sampling import check_logprobs
from runtime.errors import RequestError

FIELD_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
"""A chat's fields as callers of this API know them."""


async def responses(request: web.Request) -> web.StreamResponse:
    """The handler of POST /v1/responses."""
    context = request.app[CONTEXT]
    arrived = now()
    body = decode(await request.read(), ResponsesBody)
    with context.limiter.slot():
        earlier = earlier_items(context, body)
        items = resolved(input_items(body.input), body, context)
        conversation = Conversation(body.instructions, earlier, items)
        table = ToolTable(body.tools or ())
        with renamed_fields(FIELD_NAMES, conversation.places):
            chat = to_chat(body, conversation.messages, table)
            check_logprobs(body.top_logprobs, "top_logprobs", context.limits)
            prepared = await prepare_chat(
                request, chat, response_id=new_response_id(context.info.node_id, context.info.process)
            )
        shape = ResponsesShape(
            response_id=prepared.submission.response_id,
            created=context.unix_time(),
            model=prepared.model,
            body=body,
            tools=table,
            store=body.store is not False and context.store.is_enabled and prepared.leg.kind != "prefill",
            names=TokenNames(context.tokenizer),
        )

        def keep(response: dict[str, Any]) -> None:
            if shape.store:
                context.store.put(shape.response_id, response, [*earlier, *items])

        [output] = chat_outputs(context, prepared)
        return await respond(
            request,
            prepared.submission,
            [ContentLogprobs(output, context.tokenizer) if chat.logprobs else output],
            lambda reader: ResponsesResponse(reader, shape, keep),
            stream=bool(prepared.body.stream),
            arrived=arrived,
            headers=with_tool_warning(prepared.headers, table),
        )


async def input_tokens(request: web.Request) -> web.Response:
    """POST /v1/responses/input_tokens: how many tokens the prompt of such a request has."""
    context = request.app[CONTEXT]
    body = decode(await request.read(), InputBody)
    items = resolved(input_items(body.input), body, context)
    conversation = Conversation(body.instructions, earlier_items(context, body), items)
    with renamed_fields(FIELD_NAMES, conversation.places):
        chat = to_chat(body, conversation.messages, ToolTable(body.tools or ()))
        context.model_of(chat.model)
        check_chat(chat, context)
        ids = await encode_rendered(context, render(chat, context), chat)
    return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})


def earlier_items(context: Context, body: InputBody) -> Items:
    """The conversation that the request goes on from. Raises RequestError (404) if nobody kept it."""
    if body.previous_items is not None:
        return body.previous_items
    if body.previous_response_id is None:
        return []
    return stored(context, body.previous_response_id, "previous_response_id").conversation()


def resolved(items: Items, body: InputBody, context: Context) -> Items:
    """The items, with what is meant in the place of each `item_reference`. Raises RequestError (404) if one is gone."""
    if not any(item.get("type") == "item_reference" for item in items):
        return items
    given = {item.get("id"): item for item in body.referenced_items or ()}
    full: Items = []
    for index, item in enumerate(items):
        if item.get("type") == "item_reference":
            item_id, where = item.get("id"), f"input.{index}.id"
            if not isinstance(item_id, str):
                raise RequestError(f"{where}: must be a string", param=where)
            item = given.get(item_id) or find_item(context, item_id, where)
        full.append(item)
    return full


def with_tool_warning(headers: dict[str, str], table: ToolTable) -> dict[str, str]:
    """The headers, with a word on the tools that the model was not shown."""
    if not table.left_out:
        return headers
    warning = f"tools not run by this server were left out: {', '.join(table.left_out)}"
    other = headers.get(WARNING_HEADER)
    return {**headers, WARNING_HEADER: warning if other is None else f"{other}; {warning}"}
