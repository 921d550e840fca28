"""What routers with static lists, and tools, ask over HTTP: who this node is, how its ranks are, a release."""

import msgspec
from aiohttp import web

from node.engine_client import NodeEngineClient
from node.membership import Membership, as_json


class _Release(msgspec.Struct, frozen=True):
    transfer_id: str


_decode_release = msgspec.json.Decoder(_Release).decode


def add_cluster_routes(app: web.Application, membership: Membership, client: NodeEngineClient) -> None:
    """GET /cluster/node, GET /cluster/ranks and POST /cluster/release."""

    async def describe(_: web.Request) -> web.Response:
        return web.json_response(as_json(membership.join))

    async def ranks(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(client.ranks()), content_type="application/json")

    async def release(request: web.Request) -> web.Response:
        try:
            body = _decode_release(await request.read())
        except msgspec.ValidationError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        client.release(body.transfer_id)
        return web.Response(status=204)

    app.router.add_get("/cluster/node", describe)
    app.router.add_get("/cluster/ranks", ranks)
    app.router.add_post("/cluster/release", release)
