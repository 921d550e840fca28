"""Questions that any node can answer (models, tokenize, version): passed to one healthy node."""

import asyncio
from collections.abc import Callable, Mapping

from api.body import check_media_type
from router.errors import RouteError, no_nodes
from router.exchange import ConnectFailed, UpstreamError, UpstreamTimeout
from router.http1 import ResponseHead
from router.legs import FORWARDED_HEADERS
from router.registry import Node, Registry
from router.upstream import Upstream

_ANSWER_S = 60.0


class Proxied:
    """A node's whole answer."""

    def __init__(self, head: ResponseHead, body: bytes) -> None:
        self.head = head
        self.body = body


async def ask(
    upstream: Upstream,
    url: str,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    body: bytes = b"",
    timeout_s: float,
    clock: Callable[[], float],
) -> Proxied:
    """One request and its whole answer. Raises UpstreamError."""
    origin = upstream.origin(url)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    content = "" if method == "GET" else f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    head = f"{method} {path} HTTP/1.1\r\nhost: {origin.name}\r\n{content}{lines}\r\n".encode("latin-1")
    changed = asyncio.Event()
    exchange = origin.start(head, [body] if body else [], changed.set)
    exchange.expire_at(clock() + timeout_s, f"no answer to {method} {path.partition('?')[0]} within {timeout_s:g} s")
    pieces = []
    try:
        while True:
            pieces.append(exchange.take())
            if exchange.error is not None:
                raise exchange.error
            if exchange.complete:
                assert exchange.head is not None
                return Proxied(exchange.head, b"".join(pieces))
            changed.clear()
            await changed.wait()
    finally:
        exchange.close()


def forwarded(headers: Mapping[str, str], node_api_key: str | None) -> dict[str, str]:
    """What of a client's headers (lower-case names) a node gets, and the router's own key where the client has none."""
    sent = {name: headers[name] for name in FORWARDED_HEADERS if name in headers}
    if "authorization" not in sent and node_api_key is not None:
        sent["authorization"] = f"Bearer {node_api_key}"
    return sent


class AnyNode:
    """Asks one healthy node after another until one answers."""

    def __init__(
        self,
        upstream: Upstream,
        registry: Registry,
        node_api_key: str | None,
        clock: Callable[[], float],
    ) -> None:
        self._upstream = upstream
        self._registry = registry
        self._key = node_api_key
        self._clock = clock
        self._models: Proxied | None = None
        registry.on_change(self._forget)

    def _forget(self) -> None:
        # The last node's list stays useful while nobody is there to give another.
        if self._registry.any_node(self._clock()) is not None:
            self._models = None

    async def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Proxied:
        """Raises RouteError when no node answers, RequestError for a body that is no JSON."""
        if body:
            check_media_type(headers.get("content-type"))
        if method == "HEAD":
            method = "GET"  # the client's connection leaves the body out
        cacheable = method == "GET" and path == "/v1/models"
        if cacheable and self._models is not None:
            return self._models
        sent = forwarded(headers, self._key)
        failure: UpstreamError | None = None
        for _ in range(3):
            node = self._registry.any_node(self._clock())
            if node is None:
                raise no_nodes("No node is up.")
            try:
                answer = await self._one(node, method, path, sent, body)
            except UpstreamError as error:
                failure = error
                self._registry.suspect(node, self._clock() + 1.0)
                if not isinstance(error, ConnectFailed) and method != "GET":
                    break
                continue
            if cacheable and answer.head.status == 200:
                self._models = answer
            return answer
        status = 504 if isinstance(failure, UpstreamTimeout) else 502
        raise RouteError("No node answered.", status=status, code="upstream_failed")

    async def _one(self, node: Node, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Proxied:
        return await ask(
            self._upstream,
            node.info.url,
            method,
            path,
            headers=headers,
            body=body,
            timeout_s=_ANSWER_S,
            clock=self._clock,
        )
