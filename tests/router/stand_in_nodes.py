"""Prefill and decode nodes without a model: real HTTP servers and real members of the cluster, true to the contract.

A prefill node "computes" by sleeping and then holds a state per transfer; a decode node claims it from whoever the
request names, checking the epoch, and streams numbered words. `Fault`s make them misbehave. What a node still holds at
the end is what a router leaked.
"""

import asyncio
import collections
import contextlib
import enum
import itertools
import secrets
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import orjson
from aiohttp import web

from node.membership import Membership, MembershipConfig, as_json, describe
from runtime.requests import EngineReady, EngineStats

MODEL = "stand-in"
VOCAB = 1000

_addresses = itertools.count(1)


class Fault(enum.Enum):
    """What the next request to a node meets."""

    ERROR_500 = "error_500"
    FULL_503 = "full_503"
    BAD_400 = "bad_400"
    HANG = "hang"
    CLOSE = "close"
    """Closes the connection without an answer."""
    CLOSE_IN_STREAM = "close_in_stream"
    """Closes it after half of the events, in the middle of one."""
    CLOSE_AFTER_STREAM = "close_after_stream"
    """Closes it after the last event, without the mark that ends the body."""
    ERROR_EVENT = "error_event"
    """Answers 200 and then an error as the first event."""
    LOSE_STATE = "lose_state"
    """Prefill: answers well but holds nothing."""


class World:
    """How the stand-ins' states move: prefill ranks by hand-off address."""

    def __init__(self) -> None:
        self.ranks: dict[str, HeldStates] = {}


class HeldStates:
    """What one prefill rank holds for others."""

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.held: dict[str, int] = {}
        self.released: set[str] = set()
        self.arrived = asyncio.Condition()

    async def publish(self, transfer_id: str, prompt_tokens: int) -> None:
        async with self.arrived:
            if transfer_id not in self.released:
                self.held[transfer_id] = prompt_tokens
            self.arrived.notify_all()

    async def claim(self, transfer_id: str, epoch: str, wait_s: float) -> int:
        """The state's prompt tokens, once there. Raises LookupError when it will not come."""
        if epoch != self.epoch:
            raise LookupError(f"epoch {epoch} is not {self.epoch}")
        async with self.arrived:
            try:
                async with asyncio.timeout(wait_s):
                    await self.arrived.wait_for(lambda: transfer_id in self.held or transfer_id in self.released)
            except TimeoutError:
                raise LookupError(f"no state for {transfer_id}") from None
            if transfer_id in self.released:
                raise LookupError(f"{transfer_id} was released")
            return self.held.pop(transfer_id)


class StandInNode:
    """One node. Use as `async with`."""

    def __init__(
        self,
        world: World,
        role: str,
        *,
        routers: tuple[str, ...] = (),
        node_id: str = "",
        ranks: int = 1,
        model: str = MODEL,
        digest: str = "f0",
        local_prefill: bool = False,
        work_s: float = 0.0,
        token_s: float = 0.0,
        claim_wait_s: float = 5.0,
        keepalive_s: float = 15.0,
        notes: bool = False,
        receives: bool = True,
    ) -> None:
        """`notes`: a decode node tells a router that asks which token each chunk brings; word n is token n.

        `receives`: False for a decode node that serves alone (`prefill: local`) and has no hand-off service.
        """
        self.world = world
        self.role = role
        self.node_id = node_id or f"{role}-{secrets.token_hex(3)}"
        self.model = model
        self.local_prefill = local_prefill
        self.work_s = work_s
        self.token_s = token_s
        self.claim_wait_s = claim_wait_s
        self.keepalive_s = keepalive_s
        self.notes = notes
        self.faults: collections.deque[Fault] = collections.deque()
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        """Headers (lower case) and body of every request to generate."""
        self.released: list[str] = []
        self.way = "handoff"
        """Decode: what it says about how it got the state."""
        self.answer_delay_s = 0.0
        """Prefill: from the state being there to the answer."""
        self.cancelled = 0
        self.running = 0
        self.queued_tokens = [0] * ranks
        self.states = [HeldStates(secrets.token_hex(16)) for _ in range(ranks)]
        self.addresses = [f"127.0.0.1:{next(_addresses)}" if receives else "" for _ in range(ranks)]
        for address, states in zip(self.addresses, self.states, strict=True):
            world.ranks[address] = states
        self.port = 0
        self._config = MembershipConfig(routers=routers, first_retry_s=0.05, max_retry_s=0.2)
        self._digest = digest

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def held(self) -> dict[str, int]:
        return {transfer: tokens for states in self.states for transfer, tokens in states.held.items()}

    async def __aenter__(self) -> "StandInNode":
        app = web.Application(client_max_size=2**26)
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            app.router.add_post(path, self._generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/cluster/node", self._describe)
        app.router.add_get("/cluster/ranks", self._ranks)
        app.router.add_post("/cluster/release", self._release)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.0)
        await self._runner.setup()
        await self.listen()
        self.join = describe(
            node_id=self.node_id,
            role=self.role,  # type: ignore[arg-type]
            http_url=self.url,
            model_id=self.model,
            ranks=[
                EngineReady(
                    rank=rank,
                    epoch=self.states[rank].epoch,
                    handoff_address=self.addresses[rank],
                    format_digest=self._digest,
                    format_summary=f"format {self._digest}",
                    max_model_len=4096,
                    num_pages=100,
                    num_slots=16,
                )
                for rank in range(len(self.states))
            ],
            local_prefill=self.local_prefill,
        )
        self.membership = Membership(self._config, self.join, self.stats, self._released)
        self._member = asyncio.create_task(self.membership.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()
        self.break_connections()
        await self._runner.cleanup()

    async def leave(self) -> None:
        self._member.cancel()
        await asyncio.gather(self._member, return_exceptions=True)

    async def listen(self) -> None:
        assert self._runner.server is not None
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self._site = site
        self.port = self._runner.addresses[0][1]

    async def refuse(self) -> None:
        """Stop listening: connections are refused from now on."""
        await self._site.stop()
        self.break_connections()

    def break_connections(self) -> None:
        assert self._runner.server is not None
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def die(self) -> None:
        """As `kill -9`: every connection broken, what it held is lost."""
        await self.refuse()
        await self.leave()
        for states in self.states:
            states.held.clear()

    async def revive(self) -> None:
        """Start again on the same port, as a new incarnation."""
        self.faults.clear()
        for rank, states in zip(self.membership.join.ranks, self.states, strict=True):
            states.epoch = rank.epoch = secrets.token_hex(16)
            states.held.clear()
        self.membership = Membership(self._config, self.membership.join, self.stats, self._released)
        await self.listen()
        self.rejoin()

    def rejoin(self) -> None:
        """Attach to the routers again after `leave`."""
        self._member = asyncio.create_task(self.membership.run())

    def stats(self) -> list[EngineStats]:
        return [
            EngineStats(
                rank=rank,
                running=self.running,
                waiting=0,
                receiving=0,
                held=len(states.held),
                queued_prompt_tokens=self.queued_tokens[rank],
                pages_total=100,
                pages_free=100 - len(states.held),
                pages_quarantined=0,
                slots_total=16,
                slots_free=16,
                preemptions=0,
                prompt_tokens=0,
                generated_tokens=0,
                steps=0,
                transfers_sent=0,
                transfers_received=0,
                transfers_failed=0,
                recomputed=0,
                bytes_received=0,
            )
            for rank, states in enumerate(self.states)
        ]

    def _released(self, transfer_id: str) -> None:
        self.released.append(transfer_id)
        for states in self.states:
            states.held.pop(transfer_id, None)
            states.released.add(transfer_id)
            # Wakes whoever waits for it; the lock is free between awaits on one loop.
            for waiter in list(states.arrived._waiters):  # type: ignore[attr-defined]
                if not waiter.done():
                    waiter.set_result(True)

    # Handlers

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        body = orjson.loads(await request.read())
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append((headers, body))
        fault = self.faults.popleft() if self.faults else None
        self.running += 1
        try:
            if fault is Fault.ERROR_500:
                return _error(500, "it broke")
            if fault is Fault.FULL_503:
                return _error(503, "full", {"Retry-After": "7"})
            if fault is Fault.BAD_400 or body.get("max_tokens") == -1:
                return _error(400, "max_tokens: must be positive")
            if fault is Fault.CLOSE:
                request.transport.abort()
                return web.Response()
            if fault is Fault.HANG:
                await asyncio.sleep(3600)
            params = body.get("kv_transfer_params") or {}
            if self.role == "prefill":
                return await self._prefill(headers, body, params, fault)
            return await self._decode(request, headers, body, params, fault)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _prefill(
        self, headers: dict[str, str], body: dict[str, Any], params: dict[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        if not params.get("do_remote_decode"):
            return _error(400, "kv_transfer_params: this node only prefills")
        states = self.states[int(headers["x-data-parallel-rank"])]
        await asyncio.sleep(self.work_s)
        if fault is not Fault.LOSE_STATE:
            for transfer_id in _wire_ids(params["transfer_id"], body):
                await states.publish(transfer_id, _prompt_tokens(body))
        await asyncio.sleep(self.answer_delay_s)
        return web.json_response({"usage": {"prompt_tokens": _prompt_tokens(body), "completion_tokens": 1}})

    async def _decode(
        self,
        request: web.Request,
        headers: dict[str, str],
        body: dict[str, Any],
        params: dict[str, Any],
        fault: Fault | None,
    ) -> web.StreamResponse:
        path = "local"
        prompt_tokens = _prompt_tokens(body)
        stream: web.StreamResponse | None = None
        if params.get("do_remote_prefill"):
            path = self.way
            claiming = asyncio.ensure_future(self._claim(params, body))
            try:
                while True:
                    done, _ = await asyncio.wait({claiming}, timeout=self.keepalive_s)
                    if done:
                        break
                    if body.get("stream"):
                        first = stream is None
                        stream = stream or await self._open(request, path)
                        await stream.write((_event(body, "", role=True) if first else b"") + b": keep-alive\n\n")
                prompt_tokens = claiming.result()
            except LookupError as error:
                if stream is None:
                    return _error(500, str(error))
                await stream.write(b'data: {"error":{"message":"lost","code":500}}\n\ndata: [DONE]\n\n')
                return stream
            finally:
                claiming.cancel()
        elif not self.local_prefill:
            return _error(400, "this node does not prefill")
        count = body.get("max_tokens", 4)
        words = [f"w{index} " for index in range(count)]
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
        if not body.get("stream"):
            await asyncio.sleep(self.token_s * count)
            if fault is Fault.CLOSE_IN_STREAM:
                return await self._half_an_answer(request)
            answer = {"choices": [{"index": 0, "text": "".join(words)}], "usage": usage}
            return web.json_response(answer, headers={"X-Tandem-Path": path, "X-Node": self.node_id})
        if fault is Fault.ERROR_EVENT:
            stream = stream or await self._open(request, path)
            await stream.write(b'data: {"error":{"message":"it broke","code":500}}\n\ndata: [DONE]\n\n')
            return stream
        first = stream is None
        stream = stream or await self._open(request, path)
        notes = self.notes and "x-tandem-resumable" in headers
        transport = request.transport
        assert transport is not None

        async def write(data: bytes, note: str) -> None:
            if notes:
                transport.write(b"%x%b\r\n%b\r\n" % (len(data), note.encode(), data))
            else:
                await stream.write(data)

        resumed = len((params.get("resume") or {}).get("token_ids", ()))
        for index, word in enumerate(words[resumed:], start=resumed):
            if fault is Fault.CLOSE_IN_STREAM and index == max(resumed + 1, count // 2):
                if notes:
                    transport.write(b'20;t=%d\r\ndata: {"whole":1}\n\ndata: {"half' % index)
                else:
                    await stream.write(b'data: {"half')
                await asyncio.sleep(0.01)
                transport.abort()
                return stream
            await write(_event(body, word, role=first and index == 0), f";t={index}")
            if self.token_s:
                await asyncio.sleep(self.token_s)
        await write(
            b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n",
            ";end",
        )
        if fault is Fault.CLOSE_AFTER_STREAM:
            await asyncio.sleep(0.01)
            transport.abort()
        return stream

    async def _claim(self, params: dict[str, Any], body: dict[str, Any]) -> int:
        states = self.world.ranks.get(params["remote_address"])
        if states is None:
            raise LookupError(f"nobody is at {params['remote_address']}")
        tokens = [
            await states.claim(transfer_id, params["remote_epoch"], self.claim_wait_s)
            for transfer_id in _wire_ids(params["transfer_id"], body)
        ]
        return tokens[0]

    async def _open(self, request: web.Request, path: str) -> web.StreamResponse:
        stream = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "X-Tandem-Path": path, "X-Node": self.node_id}
        )
        await stream.prepare(request)
        return stream

    async def _half_an_answer(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
        await answer.prepare(request)
        await answer.write(b'{"choices": [')
        await asyncio.sleep(0.01)
        assert request.transport is not None
        request.transport.abort()
        return answer

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        prompt = (await request.json())["prompt"]
        return web.json_response({"count": len(prompt.split()), "tokens": list(range(len(prompt.split())))})

    async def _describe(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(as_json(self.membership.join))

    async def _ranks(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=msgspec.json.encode(self.stats()), content_type="application/json")

    async def _release(self, request: web.Request) -> web.StreamResponse:
        self._released((await request.json())["transfer_id"])
        return web.json_response({})

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.Response()


def _wire_ids(transfer_id: str, body: dict[str, Any]) -> list[str]:
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str | list) else 1
    count = prompts * body.get("n", 1)
    return [transfer_id] if count == 1 else [f"{transfer_id}-{choice}" for choice in range(count)]


def _prompt_tokens(body: dict[str, Any]) -> int:
    prompt = body.get("prompt", body.get("messages"))
    return len(prompt) if isinstance(prompt, list) else len(str(prompt).split())


def _event(body: dict[str, Any], text: str, *, role: bool) -> bytes:
    delta: dict[str, Any] = {"content": text}
    if role:
        delta["role"] = "assistant"
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta, "text": text}]}) + b"\n\n"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status, headers=headers)


@contextlib.asynccontextmanager
async def many(nodes: list[StandInNode]) -> AsyncIterator[list[StandInNode]]:
    """All of them, entered and left together."""
    async with contextlib.AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node)
        yield nodes
