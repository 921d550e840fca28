"""Which ranks serve a request: the policies, asked about those ranks that are worth asking about."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from router.config import DispatchConfig
from router.errors import no_nodes
from router.nodes import Role
from router.policies import POLICIES, Question
from router.registry import Registry, Target
from router.request import Request


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a request goes. Without `prefill` the decode rank computes the prompt itself."""

    prefill: Target | None
    decode: Target


class Picker:
    """Holds the one number both round-robin counters share."""

    def __init__(self, config: DispatchConfig, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._fallback = config.local_prefill_fallback
        self._clock = clock
        self._turns = itertools.count()
        policies = {Role.PREFILL: config.prefill_policy, Role.DECODE: config.decode_policy}
        self._policies = {role: POLICIES[name] for role, name in policies.items()}
        self._uses_session = {role: name == "session_affinity" for role, name in policies.items()}

    def turn(self) -> int:
        """The next request's number in the round."""
        return next(self._turns)

    def pair(self, request: Request, turn: int, avoid: Iterable[Target] = (), *, local: bool = False) -> Pair:
        """Both ranks, avoiding some where there are others. Raises RouteError (503) when nobody can serve.

        `local`: let the decode rank prefill, if it can.
        """
        avoid = set(avoid)
        prefills, decodes = self._registry.targets(Role.PREFILL), self._registry.targets(Role.DECODE)
        if not decodes:
            raise no_nodes("No decode node is up.")
        if self._fallback and (local or not prefills):
            able = tuple(target for target in decodes if target.node.info.local_prefill)
            if able:
                return Pair(None, self._pick(Role.DECODE, able, request, turn, avoid))
        if not prefills:
            raise no_nodes("No prefill node is up.")
        decode = self._pick(Role.DECODE, decodes, request, turn, avoid)
        if not decode.receives:
            return Pair(None, decode)
        return Pair(self._pick(Role.PREFILL, prefills, request, turn, avoid), decode)

    def other_decode(self, request: Request, turn: int, avoid: Iterable[Target]) -> Target | None:
        """A decode rank that is none of `avoid`, or None."""
        avoid = set(avoid)
        others = tuple(t for t in self._registry.targets(Role.DECODE) if t not in avoid and t.receives)
        return self._pick(Role.DECODE, others, request, turn, ()) if others else None

    def _pick(
        self, role: Role, targets: tuple[Target, ...], request: Request, turn: int, avoid: Iterable[Target]
    ) -> Target:
        now = self._clock()
        candidates = targets
        if avoid or self._registry.suspicion_until > now:
            candidates = _preferred(targets, avoid, now)
        session = request.session if self._uses_session[role] else None
        return self._policies[role](candidates, Question(role, turn, session))


def _preferred(targets: tuple[Target, ...], avoid: Iterable[Target], now: float) -> tuple[Target, ...]:
    """Neither to be avoided nor suspect; if there are none: not to be avoided, then not suspect, then all."""
    wanted = tuple(target for target in targets if target not in avoid)
    trusted = tuple(target for target in targets if target.node.suspect_until <= now)
    return tuple(target for target in trusted if target not in avoid) or wanted or trusted or targets
