"""Who is in the cluster: join, heartbeat, drain, new epochs, loss. No I/O and no clock of its own.

A node is usable from its join until it drains, leaves or is lost. A node that is lost fails its calls at once, so that
the requests behind them can go elsewhere without waiting for a timeout.
"""

import collections
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from router.nodes import NodeInfo, RankInfo, RankLoad, Refused, Role

log = logging.getLogger(__name__)

_MAX_OWED = 4096
_MAX_OWED_NODES = 256


@dataclass(frozen=True, slots=True)
class Release:
    """A transfer that was given up, as one of its ranks is told."""

    transfer_id: str
    rank: RankInfo
    computed: bool
    """Prefill had answered: without a release it would hold the state until its own limit."""


class NodeLink(Protocol):
    """How the router speaks to a node outside of requests."""

    def release(self, release: Release) -> None:
        """Tell the node that this transfer was given up. Never blocks."""

    def close(self, reason: str) -> None:
        """End the link: the node was replaced by a newer incarnation of itself."""


class NodeCall(Protocol):
    """Something under way on a node."""

    def node_lost(self, reason: str) -> None:
        """The node is gone as far as the router knows."""


class Target:
    """One rank of one node: what a policy picks. `load` is the last heartbeat's, the rest is the router's own count."""

    __slots__ = ("fresh_requests", "fresh_tokens", "in_flight", "info", "load", "node", "order")

    def __init__(self, node: "Node", info: RankInfo, order: int) -> None:
        self.node = node
        self.info = info
        self.order = order
        self.load = RankLoad(info.rank)
        self.in_flight = 0
        self.fresh_requests = 0
        """Sent since the last heartbeat, so not in `load` yet."""
        self.fresh_tokens = 0

    @property
    def name(self) -> str:
        return f"{self.node.info.node_id}/{self.info.rank}"

    @property
    def receives(self) -> bool:
        """Decode: whether it can fetch a state. A node that serves alone (`prefill: local`) has no hand-off service."""
        return bool(self.info.handoff_address) or self.node.info.dialect == "vllm"

    def __repr__(self) -> str:
        return f"Target({self.name})"


class Node:
    """One attached node. Belongs to the registry."""

    def __init__(self, info: NodeInfo, link: NodeLink, now: float) -> None:
        self.info = info
        self.link = link
        self.joined_at = now
        self.heard_at = now
        self.suspect_until = 0.0
        self.draining = False
        self.trouble = ""
        self.lost: str | None = None
        """Why it is gone; None while it is attached."""
        self.calls: set[NodeCall] = set()
        self.targets = tuple(Target(self, rank, order) for order, rank in enumerate(info.ranks))

    @property
    def usable(self) -> bool:
        return self.lost is None and not self.draining and not self.trouble

    @property
    def state(self) -> str:
        """One word for people."""
        if self.lost is not None:
            return "lost"
        return "draining" if self.draining else "troubled" if self.trouble else "ready"


class Registry:
    """All attached nodes."""

    def __init__(self, *, model: str | None = None) -> None:
        self._model = model
        self._nodes: dict[str, Node] = {}
        self._usable: dict[Role, tuple[Target, ...]] = dict.fromkeys(Role, ())
        self._owed: dict[str, collections.deque[Release]] = {}
        """Releases for nodes that are gone: only their stream may have broken, and they still hold something."""
        self._listeners: list[Callable[[], None]] = []
        self.suspicion_until = 0.0
        """After this no node is suspect."""
        self.joins = 0
        self.losses = 0

    # Reading

    @property
    def nodes(self) -> Iterable[Node]:
        return self._nodes.values()

    def get(self, node_id: str) -> Node | None:
        return self._nodes.get(node_id)

    def targets(self, role: Role) -> tuple[Target, ...]:
        """Every usable rank of this role: nodes by id, so that every router has the same order; then ranks."""
        return self._usable[role]

    def any_node(self, now: float) -> Node | None:
        """A node that can answer a question that any node can answer; decode nodes first, they are less busy."""
        usable = [t.node for role in (Role.DECODE, Role.PREFILL) for t in self._usable[role] if t.order == 0]
        return next((node for node in usable if node.suspect_until <= now), usable[0] if usable else None)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the set of usable targets may have changed."""
        self._listeners.append(listener)

    # Changes

    def join(self, info: NodeInfo, link: NodeLink, now: float) -> Node:
        """Attach a node. Raises Refused, naming both values, when it does not fit those that are here."""
        self._check_fit(info)
        if (old := self._nodes.get(info.node_id)) is not None:
            self._drop(old, "replaced by a newer join under the same id")
            old.link.close("another node joined under this id")
        node = Node(info, link, now)
        self._nodes[info.node_id] = node
        self.joins += 1
        for release in self._owed.pop(info.node_id, ()):
            link.release(release)
        log.info(
            "%s node %s joined: %s, %d ranks, model %s, format %s",
            info.role.value,
            info.node_id,
            info.url,
            len(info.ranks),
            info.model_id,
            info.format_digest[:12] or "unknown",
        )
        self._changed()
        return node

    def heartbeat(self, node: Node, loads: Iterable[RankLoad], trouble: str, now: float) -> None:
        """What a node reports about its ranks. Loads of unknown ranks are ignored."""
        node.heard_at = now
        by_rank = {target.info.rank: target for target in node.targets}
        for load in loads:
            if (target := by_rank.get(load.rank)) is not None:
                target.load = load
                target.fresh_requests = target.fresh_tokens = 0
        if trouble != node.trouble:
            log.warning("node %s: %s", node.info.node_id, trouble or "well again")
            node.trouble = trouble
            self._changed()

    def epoch_changed(self, node: Node, rank: RankInfo) -> None:
        """The rank's transfer engine was re-created: what was promised under the old epoch is void."""
        for target in node.targets:
            if target.info.rank == rank.rank:
                log.info("node %s rank %d: epoch %s -> %s", node.info.node_id, rank.rank, target.info.epoch, rank.epoch)
                target.info = rank
                return
        log.warning("node %s: new epoch for rank %d, which it does not have", node.info.node_id, rank.rank)

    def drain(self, node: Node) -> None:
        """No new work for this node; what it has goes on."""
        if not node.draining:
            node.draining = True
            log.info("node %s drains, %d calls under way", node.info.node_id, len(node.calls))
            self._changed()

    def suspect(self, node: Node, until: float) -> None:
        """A call to this node failed in a way that says something about the node: prefer others until then."""
        node.suspect_until = max(node.suspect_until, until)
        self.suspicion_until = max(self.suspicion_until, until)

    def lose(self, node: Node, reason: str) -> None:
        """The node is gone; every call on it fails now. Says nothing about a newer node under the same id."""
        if node.lost is None:
            self._drop(node, reason)

    def release(self, node: Node, release: Release) -> None:
        """Tell a node that a transfer was given up. One that is gone is told if it comes back under its id."""
        here = node if node.lost is None else self._nodes.get(node.info.node_id)
        if here is not None:
            here.link.release(release)
            return
        owed = self._owed.setdefault(node.info.node_id, collections.deque(maxlen=_MAX_OWED))
        owed.append(release)
        while len(self._owed) > _MAX_OWED_NODES:
            del self._owed[next(iter(self._owed))]

    def silent(self, now: float, limit_s: float) -> list[Node]:
        """Nodes not heard of for longer than `limit_s`."""
        return [node for node in self._nodes.values() if now - node.heard_at > limit_s]

    # Inside

    def _check_fit(self, info: NodeInfo) -> None:
        if self._model is not None and info.model_id != self._model:
            raise Refused(f"node {info.node_id} serves model {info.model_id!r}, this router is for {self._model!r}")
        for node in self._nodes.values():
            if node.info.node_id == info.node_id:
                continue
            here = node.info
            if here.model_id != info.model_id:
                raise Refused(
                    f"node {info.node_id} serves model {info.model_id!r}, node {here.node_id} serves {here.model_id!r}"
                )
            if here.format_digest and info.format_digest and here.format_digest != info.format_digest:
                raise Refused(
                    f"state format of node {info.node_id} ({info.format_digest[:12]}: {info.format_summary}) differs "
                    f"from that of node {here.node_id} ({here.format_digest[:12]}: {here.format_summary})"
                )

    def _drop(self, node: Node, reason: str) -> None:
        node.lost = reason
        if self._nodes.get(node.info.node_id) is node:
            del self._nodes[node.info.node_id]
        self.losses += 1
        log.warning("node %s is gone: %s; %d calls were under way", node.info.node_id, reason, len(node.calls))
        self._changed()
        for call in list(node.calls):
            call.node_lost(reason)

    def _changed(self) -> None:
        for role in Role:
            self._usable[role] = tuple(
                target
                for _, node in sorted(self._nodes.items())
                if node.info.role is role and node.usable
                for target in node.targets
            )
        for listener in self._listeners:
            listener()
