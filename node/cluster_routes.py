"""What a router with a static list of nodes asks over HTTP: who this node is, and to let go of a transfer."""

import msgspec
from aiohttp import web

from node.engine_client import NodeEngineClient
from node.membership import Membership


class _Release(msgspec.Struct, frozen=True):
    transfer_id: str


_decode_release = msgspec.json.Decoder(_Release).decode


def add_cluster_routes(app: web.Application, membership: Membership, client: NodeEngineClient) -> None:
    """GET /cluster/node and POST /cluster/release."""

    async def describe(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(membership.description()), content_type="application/json")

    async def release(request: web.Request) -> web.Response:
        try:
            body = _decode_release(await request.read())
        except msgspec.ValidationError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        client.release(body.transfer_id)
        return web.Response(status=204)

    app.router.add_get("/cluster/node", describe)
    app.router.add_post("/cluster/release", release)
