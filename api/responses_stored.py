"""Responses that are kept: read, listed, deleted, cancelled, and the conversation that a follow-up goes on from."""

from typing import Any

import msgspec
from aiohttp import web

from api.context import CONTEXT, Context
from api.jsonio import json_response
from api.response_ids import response_of_item
from api.response_store import Items, StoredResponse
from runtime.errors import RequestError

MAX_LISTED = 100
DEFAULT_LISTED = 20


def stored(context: Context, response_id: str, param: str = "response_id") -> StoredResponse:
    """Raises RequestError (404) for one that is not kept here."""
    found = context.store.get(response_id)
    if found is None:
        code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
        raise RequestError(f"{param}: no such response is kept here", param=param, status=404, code=code)
    return found


def find_item(context: Context, item_id: str, param: str) -> dict[str, Any]:
    """An item of a conversation that is kept here. Raises RequestError (404)."""
    response_id = response_of_item(item_id)
    found = None if response_id is None else context.store.get(response_id)
    for item in () if found is None else found.conversation():
        if item.get("id") == item_id:
            return item
    raise RequestError(f"{param}: no such item is kept here", param=param, status=404, code="item_not_found")


async def get_response(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}: a finished response that was stored."""
    found = stored(request.app[CONTEXT], request.match_info["response_id"])
    if request.query.get("stream", "false").lower() not in ("false", "0"):
        raise RequestError("stream: a stored response is not streamed again", param="stream")
    return web.Response(body=found.response, content_type="application/json")


async def delete_response(request: web.Request) -> web.Response:
    """DELETE /v1/responses/{id}."""
    context, response_id = request.app[CONTEXT], request.match_info["response_id"]
    stored(context, response_id)
    context.store.delete(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(request: web.Request) -> web.Response:
    """POST /v1/responses/{id}/cancel: end one that is being generated; a finished one is answered as it is."""
    context, response_id = request.app[CONTEXT], request.match_info["response_id"]
    for generation in list(context.live):
        if generation.name == response_id:
            generation.abort(RequestError("The response was cancelled.", status=409, code="cancelled"))
            return json_response({"id": response_id, "object": "response", "status": "cancelled", "output": []})
    return web.Response(body=stored(context, response_id).response, content_type="application/json")


async def conversation(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}/conversation: all items up to and with the response. For routers, which hand them to the
    nodes that compute a follow-up."""
    found = stored(request.app[CONTEXT], request.match_info["response_id"], "previous_response_id")
    return json_response(found.conversation())


class Page(msgspec.Struct, frozen=True):
    """Which part of a list is asked for."""

    limit: int = DEFAULT_LISTED
    order: str = "desc"
    after: str | None = None

    @classmethod
    def of(cls, request: web.Request) -> "Page":
        """Raises RequestError naming the parameter."""
        limit, order = request.query.get("limit", str(DEFAULT_LISTED)), request.query.get("order", "desc")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:4]) <= MAX_LISTED):
            raise RequestError(f"limit: must be between 1 and {MAX_LISTED}", param="limit")
        if order not in ("asc", "desc"):
            raise RequestError("order: must be asc or desc", param="order")
        return cls(int(limit), order, request.query.get("after"))


async def list_input_items(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}/input_items: what the response answered, earlier responses included."""
    response_id = request.match_info["response_id"]
    page = Page.of(request)
    items = _listed(stored(request.app[CONTEXT], response_id).items(), response_id)
    if page.order == "desc":
        items.reverse()
    start = 0
    if page.after is not None:
        ids = [item["id"] for item in items]
        if page.after not in ids:
            raise RequestError("after: no item of this response has this id", param="after")
        start = ids.index(page.after) + 1
    shown = items[start : start + page.limit]
    return json_response(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": start + page.limit < len(items),
        }
    )


_ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def _listed(items: Items, response_id: str) -> Items:
    """Items in the full form that clients read, in whatever short form they were sent."""
    suffix = response_id.partition("_")[2]
    listed: Items = []
    for number, item in enumerate(items):
        kind = item.get("type") or "message"
        full: dict[str, Any] = {
            "id": f"{_ID_PREFIXES.get(kind, 'item')}_{suffix}_in{number}",
            "status": "completed",
            **{key: value for key, value in item.items() if value is not None},
            "type": kind,
        }
        if kind == "message" and isinstance(full.get("content"), str):
            full["content"] = [_text_part(full["content"], full["role"])]
        listed.append(full)
    return listed


def _text_part(text: str, role: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}
