"""What routers with static lists, and tools, ask over HTTP: who this node is, how its ranks are, a release."""

from collections.abc import Callable

import msgspec
from aiohttp import web

from node.engine_client import NodeEngineClient
from node.membership import Membership, as_json


class _Release(msgspec.Struct, frozen=True):
    transfer_id: str


_decode_release = msgspec.json.Decoder(_Release).decode


def add_cluster_routes(
    app: web.Application,
    membership: Membership,
    client: NodeEngineClient,
    expert_tokens: Callable[[], list[list[int]]],
) -> None:
    """GET /cluster/node, /cluster/ranks and /cluster/experts, and POST /cluster/release.

    expert_tokens: tokens that chose each expert, by layer; empty where nobody counts.
    """

    async def describe(_: web.Request) -> web.Response:
        return web.json_response(as_json(membership.join))

    async def ranks(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(client.ranks()), content_type="application/json")

    async def experts(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode({"layers": expert_tokens()}), content_type="application/json")

    async def release(request: web.Request) -> web.Response:
        try:
            body = _decode_release(await request.read())
        except msgspec.ValidationError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        client.release(body.transfer_id)
        return web.Response(status=204)

    app.router.add_get("/cluster/node", describe)
    app.router.add_get("/cluster/ranks", ranks)
    app.router.add_get("/cluster/experts", experts)
    app.router.add_post("/cluster/release", release)
