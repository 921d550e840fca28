"""What a node says about itself, as the router's own frozen types. Protobuf ends in this file."""

import enum
from dataclasses import dataclass
from typing import Literal

from proto import cluster_pb2

Dialect = Literal["tandem", "vllm"]


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class Refused(Exception):
    """This node cannot be part of this cluster. The message names both values that differ."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One data-parallel rank of a node."""

    rank: int
    epoch: str
    """The incarnation of its transfer engine. For vLLM nodes: its Mooncake engine id."""
    handoff_address: str
    """Where decode claims state: host:port. For vLLM nodes: the bootstrap server's URL."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node."""

    node_id: str
    role: Role
    url: str
    model_id: str
    ranks: tuple[RankInfo, ...]
    format_digest: str = ""
    """Empty where the node does not tell (vLLM): never compared."""
    format_summary: str = ""
    max_model_len: int = 0
    local_prefill: bool = False
    dialect: Dialect = "tandem"
    version: str = ""


@dataclass(frozen=True, slots=True)
class RankLoad:
    """How busy one rank was at its last heartbeat."""

    rank: int
    running: int = 0
    waiting: int = 0
    receiving: int = 0
    held: int = 0
    queued_prompt_tokens: int = 0
    pages_total: int = 0
    pages_free: int = 0
    slots_total: int = 0
    slots_free: int = 0


_ROLES = {cluster_pb2.PREFILL: Role.PREFILL, cluster_pb2.DECODE: Role.DECODE}


def rank_from_proto(rank: cluster_pb2.Rank) -> RankInfo:
    return RankInfo(rank.rank, rank.epoch, rank.handoff_address)


def node_from_proto(join: cluster_pb2.Join) -> NodeInfo:
    """Raises Refused when the message is not a usable description of a node."""
    role = _ROLES.get(join.role)
    if role is None:
        raise Refused(f"node {join.node_id!r} joined with role {join.role}: expected PREFILL or DECODE")
    if not join.node_id:
        raise Refused("a node joined without a node_id")
    if not join.http_url.startswith(("http://", "https://")):
        raise Refused(f"node {join.node_id!r} joined with http_url {join.http_url!r}: expected http://host:port")
    ranks = tuple(sorted((rank_from_proto(rank) for rank in join.ranks), key=lambda rank: rank.rank))
    numbers = [rank.rank for rank in ranks]
    if not ranks or len(set(numbers)) != len(numbers):
        raise Refused(f"node {join.node_id!r} joined with ranks {numbers}: expected at least one, each once")
    if role is Role.PREFILL and (missing := [rank.rank for rank in ranks if not rank.handoff_address]):
        raise Refused(f"prefill node {join.node_id!r}: ranks {missing} have no hand-off address")
    return NodeInfo(
        node_id=join.node_id,
        role=role,
        url=join.http_url.rstrip("/"),
        model_id=join.model_id,
        ranks=ranks,
        format_digest=join.format_digest,
        format_summary=join.format_summary,
        max_model_len=join.max_model_len,
        local_prefill=join.local_prefill,
        version=join.version,
    )


def load_from_proto(load: cluster_pb2.RankLoad) -> RankLoad:
    return RankLoad(
        rank=load.rank,
        running=load.running,
        waiting=load.waiting,
        receiving=load.receiving,
        held=load.held,
        queued_prompt_tokens=load.queued_prompt_tokens,
        pages_total=load.pages_total,
        pages_free=load.pages_free,
        slots_total=load.slots_total,
        slots_free=load.slots_free,
    )
