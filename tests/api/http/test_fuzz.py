"""Bodies nobody would write: random mutations of valid requests, and what the OpenAPI description allows."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client import CollectorRegistry
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import build_app
from api.openapi import describe
from api.settings import ApiSettings
from api.tokenizer import Tokenizer
from benchmarks import soak_api
from tests.api.http.stand_in import StandInEngine

SCHEMA = schemathesis.openapi.from_dict(describe("0.1.0", admin=True))
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations()]
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
MAX_GROWTH_BYTES = 48 * 2**20
"""Two thousand requests fill the response store and the tokenizer's cache; a leak of 25 KB a request would show."""


@pytest.fixture(scope="module")
def base_url(tokenizer: Tokenizer) -> Iterator[str]:
    """The surface in a thread of its own, because schemathesis is a blocking client."""
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        engine = StandInEngine(tokenizer, max_model_len=300, tokens_per_step=64)
        app = build_app(engine, tokenizer, ApiSettings(enable_admin=True), CollectorRegistry())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.mark.parametrize("operation", OPERATIONS, ids=[operation.label for operation in OPERATIONS])
def test_what_the_description_allows_never_breaks_the_server(operation: Any, base_url: str) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def fuzz(case: Any) -> None:
        response = case.call(base_url=base_url, timeout=20)
        case.validate_response(response, checks=CHECKS)

    fuzz()


def test_random_mutations_never_break_the_server_and_leave_no_memory_behind() -> None:
    outcome = soak_api.run(2000, concurrency=16, seed=1)
    assert outcome.faults == []
    assert outcome.still_running == 0
    assert sum(outcome.statuses.values()) == 2000
    assert outcome.statuses["200"] > 200
    assert outcome.statuses["400"] > 200
    assert outcome.rss[-1] - outcome.rss[0] < MAX_GROWTH_BYTES
