"""/v1/responses: OpenAI's Responses API in front of the same chats, with a bounded memory for follow-ups."""

from typing import Any

from aiohttp import web

from api.body import decode
from api.chat_request import chat_outputs, prepare_chat
from api.context import CONTEXT, Context
from api.errors import renamed_fields
from api.jsonio import json_response
from api.respond import now, respond
from api.response_ids import new_response_id
from api.response_store import StoredResponse
from api.responses_format import ResponsesResponse, ResponsesShape
from api.responses_request import Messages, input_messages, to_chat
from api.responses_schema import ResponsesBody
from runtime.errors import RequestError

FIELD_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}
"""A chat's fields as callers of this API know them."""


async def responses(request: web.Request) -> web.StreamResponse:
    """The handler of POST /v1/responses."""
    context = request.app[CONTEXT]
    arrived = now()
    body = decode(await request.read(), ResponsesBody)
    with context.limiter.slot():
        if body.background:
            raise RequestError("background: not supported by this server", param="background")
        conversation = [*_earlier(context, body), *input_messages(body.input)]
        instructions: Messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
        with renamed_fields(FIELD_NAMES):
            chat = to_chat(body, [*instructions, *conversation])
            prepared = await prepare_chat(request, chat, response_id=new_response_id(context.info.node_id))
        shape = ResponsesShape(
            response_id=prepared.submission.response_id,
            created=context.unix_time(),
            model=prepared.model,
            body=body,
            store=body.store is not False and context.store.is_enabled and prepared.leg.kind != "prefill",
        )

        def keep(response: dict[str, Any]) -> None:
            if shape.store:
                context.store.put(shape.response_id, response, [*conversation, *input_messages(response["output"])])

        return await respond(
            request,
            prepared.submission,
            chat_outputs(context, prepared),
            lambda reader: ResponsesResponse(reader, shape, keep),
            stream=bool(prepared.body.stream),
            arrived=arrived,
            headers=prepared.headers,
        )


def _earlier(context: Context, body: ResponsesBody) -> Messages:
    if body.previous_response_id is None:
        return []
    return _stored(context, body.previous_response_id, "previous_response_id").messages()


def _stored(context: Context, response_id: str, param: str) -> StoredResponse:
    stored = context.store.get(response_id)
    if stored is None:
        raise RequestError(
            f"{param}: no such response is kept here", param=param, status=404, code="previous_response_not_found"
        )
    return stored


async def get_response(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}: a finished response that was stored."""
    stored = _stored(request.app[CONTEXT], request.match_info["response_id"], "response_id")
    return web.Response(body=stored.response, content_type="application/json")


async def delete_response(request: web.Request) -> web.Response:
    """DELETE /v1/responses/{id}."""
    context, response_id = request.app[CONTEXT], request.match_info["response_id"]
    _stored(context, response_id, "response_id")
    context.store.delete(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(request: web.Request) -> web.Response:
    """POST /v1/responses/{id}/cancel: end one that is being generated; a finished one is answered as it is."""
    context, response_id = request.app[CONTEXT], request.match_info["response_id"]
    for generation in list(context.live):
        if generation.name == response_id:
            generation.abort(RequestError("The response was cancelled.", status=409, code="cancelled"))
            return json_response({"id": response_id, "object": "response", "status": "cancelled", "output": []})
    stored = _stored(context, response_id, "response_id")
    return web.Response(body=stored.response, content_type="application/json")
