"""The HTTP surface of a node: every route, and what surrounds them."""

import logging

from aiohttp import web
from prometheus_client import CollectorRegistry

from api import (
    admin,
    anthropic,
    openai_chat,
    openai_completions,
    openapi,
    probes,
    responses,
    responses_stored,
    token_generate,
    tokenize,
)
from api.auth import ApiKeys
from api.backend import EngineClient
from api.context import CONTEXT, Context
from api.metrics import ApiMetrics
from api.middleware import around, on_prepare
from api.settings import ApiSettings
from api.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def build_app(
    engine: EngineClient, tokenizer: Tokenizer, settings: ApiSettings, registry: CollectorRegistry
) -> web.Application:
    """The application of one API process. Raises ConfigError for settings that cannot be used."""
    model_name = (settings.served_model_name or (engine.info.model_id,))[0]
    context = Context(engine, tokenizer, settings, ApiMetrics(engine, model_name, registry))
    app = web.Application(
        middlewares=[around(ApiKeys.from_settings(settings))],
        client_max_size=settings.max_body_bytes,
        # A client that goes away cancels its handler, and with it everything the request holds.
        handler_args={"handler_cancellation": True},
    )
    app[CONTEXT] = context
    app[probes.REGISTRY] = registry
    app.on_response_prepare.append(on_prepare(settings))
    app.on_cleanup.append(_close)
    add_routes(app)
    if settings.enable_admin:
        add_admin_routes(app)
    if engine.info.max_model_len < settings.think_max_context:
        log.warning(
            "Think Max asks for a context of %d tokens, this server has %d: such requests get %s",
            settings.think_max_context,
            engine.info.max_model_len,
            "a warning header" if settings.think_max_policy == "warn" else "an error",
        )
    return app


async def _close(app: web.Application) -> None:
    app[CONTEXT].grammars.close()


def add_routes(app: web.Application) -> None:
    router = app.router
    for path, probe in (
        ("/health", probes.health),
        ("/ping", probes.health),
        ("/version", probes.version),
        ("/metrics", probes.metrics),
        ("/load", probes.load),
        ("/openapi.json", openapi.openapi),
        ("/v1/models", probes.models),
        ("/v1/models/{model:.+}", probes.model),
        ("/v1/responses/{response_id}", responses_stored.get_response),
        ("/v1/responses/{response_id}/input_items", responses_stored.list_input_items),
        ("/v1/responses/{response_id}/conversation", responses_stored.conversation),
    ):
        router.add_get(path, probe)
    router.add_delete("/v1/responses/{response_id}", responses_stored.delete_response)
    for path, handler in (
        ("/ping", probes.health),
        ("/v1/chat/completions", openai_chat.chat_completions),
        ("/v1/completions", openai_completions.completions),
        ("/inference/v1/generate", token_generate.generate),
        ("/v1/responses", responses.responses),
        ("/v1/responses/input_tokens", responses.input_tokens),
        ("/v1/responses/{response_id}/cancel", responses_stored.cancel_response),
        ("/v1/messages", anthropic.messages),
        ("/v1/messages/count_tokens", anthropic.count_tokens),
        ("/v1/chat/completions/render", tokenize.render_chat_prompt),
        ("/v1/completions/render", tokenize.render_completion_prompts),
        ("/tokenize", tokenize.tokenize),
        ("/detokenize", tokenize.detokenize),
    ):
        router.add_post(path, handler)


def add_admin_routes(app: web.Application) -> None:
    """What can disturb other callers' requests."""
    app.router.add_post("/abort_requests", admin.abort_requests)
    app.router.add_post("/reset_prefix_cache", admin.reset_prefix_cache)
    app.router.add_get("/server_info", admin.server_info)
