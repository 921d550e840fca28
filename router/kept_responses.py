"""Responses that a node keeps: found by the tag in their ids, asked there, and given to whoever computes a follow-up.

A node keeps its responses in memory. A follow-up is computed by any pair of nodes all the same: the router asks the
keeper for the conversation so far and adds it to the body of both legs. Nothing of it is kept here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from api.response_ids import is_kept_by, response_of_item
from router.errors import RouteError
from router.exchange import UpstreamError, UpstreamTimeout
from router.proxy import Proxied, ask, forwarded
from router.registry import Node, Registry
from router.request import Request
from router.upstream import Upstream
from runtime.errors import RequestError

RESPONSES = "/v1/responses"
CONVERSATION_MEMBER = "previous_items"
REFERENCED_MEMBER = "referenced_items"
MAX_REFERENCED = 64
"""Conversations that are fetched for the references of one request."""
_ANSWER_S = 30.0


class KeptResponses:
    """Questions about responses by id."""

    def __init__(
        self, upstream: Upstream, registry: Registry, node_api_key: str | None, clock: Callable[[], float]
    ) -> None:
        self._upstream = upstream
        self._registry = registry
        self._key = node_api_key
        self._clock = clock

    def keeper(self, response_id: str, param: str = "response_id") -> Node:
        """The node whose tag the id bears, draining or not. Raises RequestError (404) when there is none."""
        for node in self._registry.nodes:
            if is_kept_by(response_id, node.info.node_id):
                return node
        raise RequestError(
            f"{param}: no node that is here keeps such a response; a node's responses are gone when it is",
            param=param,
            status=404,
            code="previous_response_not_found" if param == "previous_response_id" else "response_not_found",
        )

    async def ask(self, node: Node, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Proxied:
        """What the keeper answers. Raises RouteError when it does not."""
        try:
            return await ask(
                self._upstream,
                node.info.url,
                method,
                path,
                headers=forwarded(headers, self._key),
                body=body,
                timeout_s=_ANSWER_S,
                clock=self._clock,
            )
        except UpstreamError as error:
            self._registry.suspect(node, self._clock() + 1.0)
            raise RouteError(
                f"Node {node.info.node_id}, which keeps this response, did not answer.",
                status=504 if isinstance(error, UpstreamTimeout) else 502,
                code="upstream_failed",
            ) from None

    async def add_what_is_kept(self, request: Request) -> Proxied | None:
        """Give a request what it goes on from and refers to. Returns the keeper's answer if that is a refusal.

        Raises RequestError (404) when no node keeps the response, RouteError when its keeper does not answer.
        """
        await self._add_referenced(request)
        response_id = request.fields.get("previous_response_id")
        if not isinstance(response_id, str):
            return None  # none, or a mistake that the nodes will name
        answer = await self._conversation(response_id, "previous_response_id", request.headers)
        if answer.head.status != 200:
            return answer
        request.add_member(CONVERSATION_MEMBER, answer.body)
        return None

    async def _conversation(self, response_id: str, param: str, headers: Mapping[str, str]) -> Proxied:
        node = self.keeper(response_id, param)
        return await self.ask(node, "GET", f"{RESPONSES}/{response_id}/conversation", headers)

    async def _add_referenced(self, request: Request) -> None:
        """The items that `item_reference` items mean. What is not found the nodes will name."""
        wanted = _references(request.fields.get("input"))
        found: dict[str, Any] = {}
        # The newest conversation holds what went before it.
        asked: set[str] = set()
        for item_id in reversed(wanted):
            response_id = response_of_item(item_id)
            if item_id in found or response_id is None or response_id in asked:
                continue
            if len(asked) == MAX_REFERENCED:
                break
            asked.add(response_id)
            answer = await self._conversation(response_id, "input", request.headers)
            if answer.head.status == 200:
                items = {item.get("id"): item for item in msgspec.json.decode(answer.body)}
                found |= {wanted_id: items[wanted_id] for wanted_id in wanted if wanted_id in items}
        if found:
            request.add_member(REFERENCED_MEMBER, msgspec.json.encode(list(found.values())))


def _references(items: Any) -> list[str]:
    """The ids in the input that stand for items."""
    if not isinstance(items, list):
        return []
    references = [item for item in items if isinstance(item, dict) and item.get("type") == "item_reference"]
    return [item["id"] for item in references if isinstance(item.get("id"), str)]
