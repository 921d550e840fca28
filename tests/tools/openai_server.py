"""A small OpenAI-compatible server that streams numbered tokens at a set pace and can fail in the ways servers do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
from aiohttp import web


class OpenAIServer:
    """Serves on a free port of the loopback interface. `fault` decides how the next requests end."""

    def __init__(self, *, prefill_s: float = 0.02, token_s: float = 0.01) -> None:
        self.prefill_s = prefill_s
        self.token_s = token_s
        self.fault = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open = self.most_open = 0
        self.url = ""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["OpenAIServer"]:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            assert site._server is not None
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
            yield self
        finally:
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "numbers"}] if self.fault != "no model" else []})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.fault == "refuse":
            return web.json_response({"error": {"message": "queue is full"}}, status=503)
        chat = request.path.endswith("chat/completions")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await response.prepare(request)
            await self._stream(response, body, chat)
        finally:
            self.open -= 1
        return response

    async def _stream(self, response: web.StreamResponse, body: dict[str, Any], chat: bool) -> None:
        if chat:
            await self._say(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(self.prefill_s)
        count = body["max_tokens"]
        for number in range(count):
            if number:
                await asyncio.sleep(self.token_s)
            if self.fault == "error event" and number == 2:
                await self._say(response, {"error": {"message": "decode node lost"}})
                return
            if self.fault == "cut" and number == 2:
                return
            if self.fault == "not json":
                await response.write(b"data: {nonsense\n\n")
                return
            text = f" {number}"
            piece = {"delta": {"reasoning_content": text}} if chat else {"text": text if number % 2 else ""}
            await self._say(response, {"choices": [piece | {"finish_reason": None}]})
        last = {"delta": {}} if chat else {"text": ""}
        await self._say(response, {"choices": [last | {"finish_reason": "length"}]})
        if self.fault != "no usage":
            prompt = body.get("prompt") or body["messages"][0]["content"].split()
            usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
            await self._say(response, {"choices": [], "usage": usage})
        await response.write(b": comment\n\ndata: [DONE]\n\n")

    async def _say(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        data = b"data: " + orjson.dumps(event) + b"\n\n"
        # In two pieces: clients may not count on an event per read.
        await response.write(data[:9])
        await response.write(data[9:])
