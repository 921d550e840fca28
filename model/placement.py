"""Which rank holds which routed expert of which layer. No torch.

Experts are renumbered in the order of the ranks that hold them, so that every rank holds a run of consecutive places
and nothing below this file knows of anything else. Without a file each rank holds an equal run of experts, which are
then their own places.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model.config import ModelConfig
from runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LayerShare:
    """The routed experts of one layer on one rank."""

    first: int
    """Place of the first one."""
    experts: tuple[int, ...]
    """The checkpoint's number of the expert at each place from `first` on."""
    places: tuple[int, ...] | None = None
    """Place of every expert of the layer; None: its own number."""


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """One rank's routed experts: the same consecutive ones in every layer, but for the layers listed."""

    experts: range
    layers: tuple[tuple[int, LayerShare], ...] = ()

    def layer(self, number: int) -> LayerShare:
        for listed, share in self.layers:
            if listed == number:
                return share
        return LayerShare(self.experts.start, tuple(self.experts))


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ranks: int
    layers: dict[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Placement:
    """The experts of all ranks.

    size: ranks. ranks_LE: per layer with a placement of its own, the rank of each expert.
    """

    num_experts: int
    size: int
    ranks_LE: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @classmethod
    def even(cls, num_experts: int, size: int) -> Placement:
        """Consecutive experts; the numbers of two ranks differ by at most one."""
        return cls(num_experts, size)

    @classmethod
    def load(cls, path: Path, config: ModelConfig, size: int) -> Placement:
        """Read a placement file: JSON {"ranks": 4, "layers": {"3": [rank of expert 0, rank of expert 1, ...], ...}}.
        Layers that it does not name are even. Raises ConfigError naming file, layer and expert."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_File)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: {error}") from None
        if found.ranks != size:
            raise ConfigError(f"{path}: ranks={found.ranks}, but {size} ranks share the experts")
        for layer, ranks in found.layers.items():
            where = f"{path}: layers.{layer}"
            if not 0 <= layer < config.num_hidden_layers:
                raise ConfigError(f"{where}: the model has layers 0..{config.num_hidden_layers - 1}")
            if len(ranks) != config.n_routed_experts:
                raise ConfigError(f"{where}: places {len(ranks)} of {config.n_routed_experts} experts")
            for expert, rank in enumerate(ranks):
                if not 0 <= rank < size:
                    raise ConfigError(f"{where}: expert {expert} is on rank {rank}, but there are ranks 0..{size - 1}")
            held = Counter(ranks)
            for rank in range(size):
                if not held[rank]:
                    raise ConfigError(f"{where}: rank {rank} holds no expert")
        return cls(config.n_routed_experts, size, tuple(sorted(found.layers.items())))

    def ranks_of(self, layer: int) -> tuple[int, ...]:
        """The rank of each expert of a layer."""
        even = (rank for rank in range(self.size) for _ in self._run(rank))
        return dict(self.ranks_LE).get(layer) or tuple(even)

    def _run(self, rank: int) -> range:
        return range(self.num_experts * rank // self.size, self.num_experts * (rank + 1) // self.size)

    def share(self, rank: int) -> ExpertShare:
        """What `rank` holds."""
        return ExpertShare(self._run(rank), tuple((layer, _share(ranks, rank)) for layer, ranks in self.ranks_LE))


def _share(ranks: tuple[int, ...], rank: int) -> LayerShare:
    order = sorted(range(len(ranks)), key=lambda expert: (ranks[expert], expert))
    places = [0] * len(ranks)
    for place, expert in enumerate(order):
        places[expert] = place
    mine = tuple(expert for expert in order if ranks[expert] == rank)
    return LayerShare(places[mine[0]], mine, tuple(places))
