"""A rank's place in the group of ranks that share the experts: which part of the model is its own, how it reaches the
rest, and what all ranks must have configured alike."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.device import enter
from engine.expert_exchange import ExpertExchange
from engine.head_exchange import HeadExchange
from engine.loader import Sharing, resolve
from engine.lockstep import Lockstep
from engine.rank_group import RankGroup
from model.config import ModelConfig
from model.placement import Placement
from node.config import NodeConfig
from node.fingerprint import model_fingerprint
from runtime.errors import ConfigError

log = logging.getLogger(__name__)


_ALIKE = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_pages",
    "kv_cache_memory_bytes",
    "cudagraph_capture_sizes",
)
"""Keys of `engine` that decide which steps are measured and captured at start."""


@dataclass(frozen=True, slots=True)
class Membership:
    """One rank in its group."""

    group: RankGroup
    lockstep: Lockstep
    sharing: Sharing


def join_group(config: NodeConfig, local_rank: int, group_port: int) -> Membership:
    """Meet the other ranks. `group_port`: where this node's ranks meet when the group is theirs alone.

    Raises ConfigError for what is configured wrongly, EngineError when the others do not come or are configured
    otherwise."""
    shared = config.expert_parallel
    model_config = ModelConfig.load(Path(config.engine.model))
    size = config.expert_ranks
    if size > model_config.n_routed_experts:
        raise ConfigError(f"{size} ranks cannot share {model_config.n_routed_experts} experts")
    placement = shared.placement_for(model_config, size)
    engine = resolve(config.engine, local_rank)
    device = torch.device(engine.device)
    enter(device)
    rank = shared.first_rank + local_rank
    group = RankGroup(
        rank,
        size,
        host=config.group_host,
        meeting=shared.address or f"127.0.0.1:{group_port}",
        device=device,
        timeout_s=config.peer_timeout_s,
        terms=_terms(config, engine, model_config, placement),
    )
    lockstep = Lockstep(group.mesh, size, config.peer_timeout_s)
    exchange = ExpertExchange(
        group,
        lockstep,
        num_experts=model_config.n_routed_experts,
        quantised=engine.numerics == "released",
        part_tokens=shared.part_tokens_for(size),
        sums=getattr(torch, shared.sums),
    )
    sharing = Sharing(
        experts=placement.share(rank),
        exchange=exchange,
        head=HeadExchange(group, lockstep) if shared.shard_lm_head else None,
        least=lambda value: group.least(value, config.ready_timeout_s),
    )
    return Membership(group, lockstep, sharing)


def _terms(config: NodeConfig, engine: EngineConfig, model_config: ModelConfig, placement: Placement) -> dict[str, str]:
    """What the ranks' exchanges depend on: sizes of buffers, shapes that are captured, whose experts are whose."""
    shared = config.expert_parallel
    terms = {
        "model": model_fingerprint(engine, model_config),
        "device": torch.device(engine.device).type,
        "placement": str(placement.ranks_LE),
        **{f"expert_parallel.{name}": getattr(shared, name) for name in ("shard_lm_head", "part_tokens", "sums")},
        **{f"engine.{name}": getattr(engine, name) for name in _ALIKE},
    }
    return {name: str(value) for name, value in terms.items()}
