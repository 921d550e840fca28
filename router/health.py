"""Honest health: not "the nodes answer", but "a request went through prefill, hand-off and decode a moment ago".

Real traffic proves pairs as it passes. Where there is none, the canary sends tiny completions of its own through the
pair that was proven longest ago.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import orjson

from router.config import HealthConfig
from router.metrics import RouterMetrics
from router.nodes import Role
from router.picker import Pair
from router.registry import Registry, Target
from router.request import Request
from router.sink import MemorySink

if TYPE_CHECKING:
    from router.dispatch import Dispatcher

log = logging.getLogger(__name__)

_NEVER = float("-inf")
_FIRST_RETRY_S = 0.25


class Proofs:
    """When each pair of ranks last gave a good answer. A target belongs to one incarnation of a node."""

    def __init__(self, config: HealthConfig, registry: Registry, *, fallback: bool) -> None:
        self._config = config
        self._registry = registry
        self._fallback = fallback
        self._proven: dict[Pair, float] = {}
        self.last = _NEVER
        registry.on_change(self._forget_the_gone)

    def record(self, prefill: Target | None, decode: Target, now: float) -> None:
        self._proven[Pair(prefill, decode)] = self.last = now

    def disprove(self, pair: Pair) -> None:
        """The canary failed there: what was proven before counts no more."""
        self._proven.pop(pair, None)

    def pairs(self) -> list[Pair]:
        """Every pair that could serve now."""
        prefills, decodes = self._registry.targets(Role.PREFILL), self._registry.targets(Role.DECODE)
        if prefills:
            alone = [Pair(None, decode) for decode in decodes if not decode.receives]
            return [Pair(prefill, decode) for prefill in prefills for decode in decodes if decode.receives] + alone
        return [Pair(None, decode) for decode in decodes if self._fallback and decode.node.info.local_prefill]

    def proven_at(self, pair: Pair) -> float:
        return self._proven.get(pair, _NEVER)

    def healthy(self, now: float) -> bool:
        """Whether some pair that could serve now did so recently."""
        usable = {target for role in Role for target in self._registry.targets(role)}
        return any(
            now - at <= self._config.proof_age_s
            and pair.decode in usable
            and (pair.prefill is None or pair.prefill in usable)
            for pair, at in self._proven.items()
        )

    def stalest(self) -> Pair | None:
        """The pair proven longest ago; among those never proven, one with ranks that have no proof at all."""
        seen: dict[Target | None, float] = {}
        for pair, at in self._proven.items():
            for target in (pair.prefill, pair.decode):
                seen[target] = max(seen.get(target, _NEVER), at)
        return min(
            self.pairs(),
            key=lambda pair: (
                self.proven_at(pair),
                min(seen.get(pair.prefill, _NEVER), seen.get(pair.decode, _NEVER)),
                max(seen.get(pair.prefill, _NEVER), seen.get(pair.decode, _NEVER)),
            ),
            default=None,
        )

    def unproven(self) -> Iterable[Target]:
        """Usable ranks that no good answer ever came through."""
        seen = {target for pair in self._proven for target in (pair.prefill, pair.decode)}
        return [t for pair in self.pairs() for t in (pair.prefill, pair.decode) if t is not None and t not in seen]

    def report(self, now: float) -> dict[str, Any]:
        """The body of /health."""
        proven = [
            {
                "prefill": pair.prefill.name if pair.prefill is not None else None,
                "decode": pair.decode.name,
                "age_s": round(now - at, 3),
            }
            for pair, at in sorted(self._proven.items(), key=lambda item: -item[1])
        ]
        healthy = self.healthy(now)
        count = len(self.pairs())
        return {
            "status": "healthy" if healthy else "unhealthy",
            "reason": None if healthy else ("no pair was proven recently" if count else "no pair of nodes is up"),
            "pairs": count,
            "proof_age_s": self._config.proof_age_s,
            "proven": proven,
        }

    def _forget_the_gone(self) -> None:
        self._proven = {
            pair: at
            for pair, at in self._proven.items()
            if pair.decode.node.lost is None and (pair.prefill is None or pair.prefill.node.lost is None)
        }


class Canary:
    """Sends the router's own requests when there is something to prove."""

    def __init__(
        self,
        config: HealthConfig,
        proofs: Proofs,
        registry: Registry,
        dispatcher: "Dispatcher",
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._proofs = proofs
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._clock = clock
        self._changed = asyncio.Event()
        self._failures = 0
        self._skip: set[Target] = set()
        registry.on_change(self._on_change)

    def _on_change(self) -> None:
        self._failures = 0
        self._skip.clear()
        self._changed.set()

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            if (pair := self._due()) is not None:
                await self._probe(pair)
            self._changed.clear()
            try:
                async with asyncio.timeout(self._pause_s()):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _pause_s(self) -> float:
        if self._failures:
            return min(_FIRST_RETRY_S * 2.0 ** min(self._failures - 1, 10), self._config.canary_interval_s)
        if self._wanting():
            return 0.0
        return min(1.0, self._config.canary_interval_s / 4)

    def _wanting(self) -> bool:
        """Some rank was never proven, and was not tried in vain either."""
        return any(target not in self._skip for target in self._proofs.unproven())

    def _due(self) -> Pair | None:
        now = self._clock()
        idle = now - self._proofs.last >= self._config.canary_interval_s
        if idle or self._wanting() or not self._proofs.healthy(now):
            return self._proofs.stalest()
        return None

    async def _probe(self, pair: Pair) -> None:
        model = pair.decode.node.info.model_id
        body = {
            "model": model,
            "prompt": list(self._config.canary_tokens),
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
            "stream": False,
        }
        request = Request("/v1/completions", {}, orjson.dumps(body), "", max_choices=1)
        request.request_id = f"canary-{request.number}"
        sink = MemorySink()
        started = self._clock()
        try:
            async with asyncio.timeout(self._config.canary_timeout_s):
                await self._dispatcher.serve(request, sink, pair)
        except TimeoutError:
            sink.body = f"no answer within {self._config.canary_timeout_s:g} s".encode()
        # An answer that came another way than through this pair proves nothing about it.
        good = sink.status == 200 and self._proofs.proven_at(pair) >= started
        self._metrics.canaries.labels("good" if good else "failed").inc()
        name = f"{pair.prefill.name if pair.prefill is not None else 'local'} -> {pair.decode.name}"
        if good:
            if self._failures:
                log.info("canary through %s: good again", name)
            self._failures = 0
            self._skip.clear()
        else:
            self._failures += 1
            self._skip.update(target for target in (pair.prefill, pair.decode) if target is not None)
            self._proofs.disprove(pair)
            log.warning("canary through %s failed with %d: %s", name, sink.status, sink.body[:300])
