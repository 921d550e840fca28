"""One node's HTTP surface over a real socket, with the stand-in engine behind it."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession, ClientTimeout, web
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from api.app import build_app
from api.settings import ApiSettings
from api.tokenizer import Tokenizer
from tests.api.http.stand_in import StandInEngine
from tests.api.http.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


class Server:
    """A running surface and a client of it."""

    def __init__(self, engine: StandInEngine, base_url: str, session: ClientSession) -> None:
        self.engine = engine
        self.base_url = base_url
        self.session = session

    async def post(self, path: str, body: Any, **options: Any) -> ClientResponse:
        response = await self.session.post(self.base_url + path, json=body, **options)
        await response.read()
        return response

    async def post_json(self, path: str, body: Any, status: int = 200, **options: Any) -> dict[str, Any]:
        response = await self.post(path, body, **options)
        answer: dict[str, Any] = await response.json()
        assert response.status == status, answer
        return answer

    async def get(self, path: str, **options: Any) -> ClientResponse:
        response = await self.session.get(self.base_url + path, **options)
        await response.read()
        return response


async def samples(server: Server) -> dict[tuple[str, str], float]:
    """(name, engine) -> value of all series."""
    response = await server.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name + sample.labels.get("finished_reason", "") + sample.labels.get("le", ""),
         sample.labels.get("engine", "")): sample.value
        for family in text_string_to_metric_families(await response.text())
        for sample in family.samples
    }  # fmt: skip


@pytest.fixture
async def serve(tokenizer: Tokenizer) -> AsyncIterator[Any]:
    """A factory: `await serve(settings, max_model_len=..., ...)`, options as of StandInEngine."""
    runners: list[web.AppRunner] = []
    session = ClientSession(timeout=ClientTimeout(total=30))

    async def start(settings: ApiSettings | None = None, **options: Any) -> Server:
        engine = StandInEngine(tokenizer, **options)
        app = build_app(engine, tokenizer, settings or ApiSettings(), CollectorRegistry())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        return Server(engine, f"http://{host}:{port}", session)

    yield start
    await session.close()
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def server(serve: Any) -> Server:
    started: Server = await serve()
    return started
