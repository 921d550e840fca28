"""YAML section `expert_parallel` of a node: how the ranks that share the experts find each other and share."""

from pathlib import Path
from typing import Literal

import msgspec

from model.config import ModelConfig
from model.placement import Placement

_TOGETHER = 32_768
"""Every part expands the weights of a rank's experts again, which fewer tokens do not pay for (docs/benchmarks.md)."""


class ExpertParallelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """With `enable_expert_parallel`. All nodes of a group must say the same, but for `host` and `first_rank`."""

    address: str = ""
    """host:port where the ranks of a group of several nodes meet: a free port on the host of rank 0. Empty: the group
    is this node's ranks."""
    host: str = ""
    """The address at which ranks of other nodes reach this node's. Empty: `advertise_host`, else `host`."""
    ranks: int | None = None
    """Ranks in the group. None: this node's `data_parallel_size`."""
    first_rank: int = 0
    """Number of this node's first rank in the group."""

    placement: str = ""
    """JSON file {"ranks": R, "layers": {"3": [rank of expert 0, rank of expert 1, ...], ...}}. Empty, and in layers
    that it does not name: equal runs of experts."""
    shard_lm_head: bool = False
    """Share out the rows of the vocabulary head as well: less memory, two more exchanges a step."""
    part_tokens: int | Literal["auto"] = "auto"
    """Tokens per rank that go through the experts together; larger steps do so in parts, which hides the exchange
    behind the computation and bounds its memory. "auto": 32,768 of all ranks together."""
    sums: Literal["float32", "bfloat16"] = "float32"
    """How partial sums travel; they are added in float32 in any case. bfloat16 halves the bytes and rounds each rank's
    part once."""
    load_counters: Literal["off", "layers", "experts"] = "off"
    """Count the tokens that choose each expert. layers: metrics by layer and rank that holds the expert; experts: by
    expert as well. Either way `GET /cluster/experts` tells all, for `python -m tools.place_experts`."""
    load_interval_s: float = 5.0
    """How often the counters are read from the device."""

    def part_tokens_for(self, size: int) -> int:
        """`part_tokens`, resolved for a group of `size` ranks."""
        if self.part_tokens != "auto":
            return self.part_tokens
        return max(1, _TOGETHER // size)

    def placement_for(self, model_config: ModelConfig, size: int) -> Placement:
        """Which of `size` ranks holds which expert. Raises ConfigError naming what is wrong with the file."""
        if self.placement:
            return Placement.load(Path(self.placement), model_config, size)
        return Placement.even(model_config.n_routed_experts, size)

    def __post_init__(self) -> None:
        if self.address:
            host, separator, port = self.address.rpartition(":")
            if not separator or not host or not port.isdigit() or not 1 <= int(port) <= 65535:
                raise ValueError(f"address={self.address!r} is not host:port")
            if self.ranks is None:
                raise ValueError("address needs ranks: how many there are in the group")
        elif self.ranks is not None or self.first_rank:
            raise ValueError("ranks and first_rank need address: where the nodes of the group meet")
        if self.first_rank < 0:
            raise ValueError(f"first_rank={self.first_rank} must not be negative")
        for name in ("part_tokens", "load_interval_s"):
            value = getattr(self, name)
            if value != "auto" and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
