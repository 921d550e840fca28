"""What operators, load balancers and client libraries ask before they send work."""

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from api.context import CONTEXT, Context
from api.jsonio import json_response
from runtime.errors import RequestError

REGISTRY = web.AppKey("REGISTRY", CollectorRegistry)


async def health(request: web.Request) -> web.Response:
    """200 with an empty body while every rank can serve, else 503 with the reason."""
    reason = request.app[CONTEXT].engine.health()
    if reason is None:
        return web.Response(status=200)
    return json_response(
        {"error": {"message": reason, "type": "ServiceUnavailableError", "param": None, "code": 503}}, status=503
    )


async def version(request: web.Request) -> web.Response:
    return json_response({"version": request.app[CONTEXT].info.version})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text."""
    text = generate_latest(request.app[REGISTRY])
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def load(request: web.Request) -> web.Response:
    """How many requests are generating now."""
    return json_response({"server_load": request.app[CONTEXT].limiter.active})


async def models(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    return json_response({"object": "list", "data": [_card(context, name) for name in context.model_names]})


async def model(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    name = request.match_info["model"]
    if name not in context.model_names:
        raise RequestError("This model does not exist.", param="model", status=404, code="model_not_found")
    return json_response(_card(context, name))


def _card(context: Context, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "tandem",
        "root": context.info.model_id,
        "parent": None,
        "max_model_len": context.info.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": context.created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }
