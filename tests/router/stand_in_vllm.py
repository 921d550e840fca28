"""vLLM nodes without a model, as the wire protocol has them: routes, metrics, the bootstrap table, and the rules of
who holds and fetches what. No Tandem extension is understood here.
"""

import collections
from typing import Any

import orjson
from aiohttp import web

MODEL = "vllm-model"


class VllmWorld:
    """Which prefill engine holds which transfer: (engine id, transfer id)."""

    def __init__(self) -> None:
        self.held: set[tuple[str, str]] = set()
        self.engines: set[str] = set()


class StandInVllm:
    """One vLLM node, prefill (with a bootstrap server) or decode. Use as `async with`."""

    def __init__(self, world: VllmWorld, role: str, *, ranks: int = 1, named_in_metrics: bool = True) -> None:
        self.world = world
        self.role = role
        self.ranks = ranks
        self.named_in_metrics = named_in_metrics
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.queries = 0
        self.statuses: collections.deque[int] = collections.deque()
        self.missing_ranks: set[int] = set()
        self.generation = 0
        self.port = self.bootstrap_port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def engine_id(self, rank: int) -> str:
        return f"engine{self.generation}_dp{rank}"

    def restart(self) -> None:
        """New engine ids; what was held is gone."""
        for rank in range(self.ranks):
            self.world.engines.discard(self.engine_id(rank))
        self.generation += 1
        self.world.held.clear()
        self.world.engines.update(self.engine_id(rank) for rank in range(self.ranks))

    async def __aenter__(self) -> "StandInVllm":
        app = web.Application()
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._generate)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        self.port = await self._serve(app)
        if self.role == "prefill":
            self.world.engines.update(self.engine_id(rank) for rank in range(self.ranks))
            bootstrap = web.Application()
            bootstrap.router.add_get("/query", self._query)
            self.bootstrap_port = await self._serve(bootstrap)
        return self

    async def __aexit__(self, *_: object) -> None:
        for runner in self._runners:
            await runner.cleanup()

    _runners: list[web.AppRunner]

    async def _serve(self, app: web.Application) -> int:
        self.__dict__.setdefault("_runners", [])
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.0)
        self._runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner.addresses[0][1]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        ranks = range(self.ranks) if self.named_in_metrics else ()
        lines = [f'vllm:num_requests_running{{engine="{rank}",model_name="{MODEL}"}} 0.0' for rank in ranks]
        return web.Response(text="\n".join(["process_start_time_seconds 1", 'other{engine="9"} 1', *lines]))

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL}]})

    async def _query(self, request: web.Request) -> web.Response:
        self.queries += 1
        table = {
            str(rank): {"engine_id": self.engine_id(rank), "worker_addr": {"0": {"0": "tcp://127.0.0.1:1"}}}
            for rank in range(self.ranks)
            if rank not in self.missing_ranks
        }
        return web.json_response(table)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append((headers, body))
        params = body.get("kv_transfer_params") or {}
        if self.statuses:
            status = self.statuses.popleft()
            if status == 500:
                return web.json_response({"error": {"message": "Internal server error", "code": 500}}, status=500)
        rank = int(headers.get("x-data-parallel-rank", "0"))
        if rank >= self.ranks:
            return web.json_response({"error": {"message": "rank out of range"}}, status=400)
        if body.get("model", MODEL) != MODEL:
            # The front end refuses it, and has the prefill side told to let go.
            self.world.held.discard((params.get("remote_engine_id", ""), params.get("transfer_id", "")))
            return web.json_response({"error": {"message": "no such model", "code": 404}}, status=404)
        if params.get("do_remote_decode"):
            if body.get("max_tokens") == 1 and body.get("min_tokens") == 1 and not body.get("stream"):
                self.world.held.add((self.engine_id(rank), params["transfer_id"]))
            usage = {"prompt_tokens": 7, "total_tokens": 8, "completion_tokens": 1}
            usage["prompt_tokens_details"] = {"cached_tokens": 3}
            return web.json_response({"choices": [{"text": "x", "finish_reason": "length"}], "usage": usage})
        if params.get("do_remote_prefill"):
            key = (params["remote_engine_id"], params["transfer_id"])
            if params["remote_engine_id"] not in self.world.engines or key not in self.world.held:
                return web.json_response({"error": {"message": "Internal server error", "code": 500}}, status=500)
            self.world.held.discard(key)
        usage = {"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": 2}
        usage["prompt_tokens_details"] = {"cached_tokens": 7}
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "hello world"}], "usage": usage})
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await stream.prepare(request)
        for word in ("hello ", "world"):
            await stream.write(b"data: " + orjson.dumps({"choices": [{"text": word}]}) + b"\n\n")
        await stream.write(b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n")
        return stream
