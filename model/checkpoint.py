"""Loads a released-format checkpoint directory: config.json, model.safetensors.index.json and its shards.

Everything that can be wrong is found from the headers, before a weight is read: names, shapes and dtypes must be those
of the inventory. Weights are then streamed shard by shard into the model's holders, only those it has (its
experts; no MTP block unless it computes one).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection
from pathlib import Path

import msgspec
from tqdm import tqdm

from model.config import ModelConfig
from model.inventory import TensorSpec, expert_of, inventory
from model.safetensors_file import MappedTensors, SafetensorsFile
from model.transformer import Transformer
from runtime.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
_NAMED = 5
"""Tensors that an error names before it only counts."""


class Checkpoint:
    """A validated checkpoint directory; holds headers, no weights.

    Raises ConfigError for config.json, CheckpointError for the index, a shard or a tensor."""

    def __init__(self, directory: str | Path, config: ModelConfig | None = None) -> None:
        self.directory = Path(directory)
        self.config = ModelConfig.load(self.directory) if config is None else config
        weight_map = self._read_index()
        self.shards = {name: SafetensorsFile(self.directory / name) for name in sorted(set(weight_map.values()))}
        self.specs = {spec.name: spec for spec in inventory(self.config)}
        self._check_names(weight_map)
        self._check_specs(weight_map)
        self.shard_of = weight_map

    @property
    def num_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX_NAME
        try:
            index = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON: {error}") from None
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: weight_map is missing or empty")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not shard or Path(shard).name != shard:
                raise CheckpointError(f"{path}: weight_map: {name}: {shard!r} is not a file name in the directory")
        return weight_map

    def _check_names(self, weight_map: dict[str, str]) -> None:
        index = self.directory / INDEX_NAME
        missing = [name for name in self.specs if name not in weight_map]
        surplus = [name for name in weight_map if name not in self.specs]
        if missing or surplus:
            parts = [
                f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has surplus", surplus)) if names
            ]
            raise CheckpointError(f"{index}: {'; '.join(parts)}")
        for shard, file in self.shards.items():
            absent = [name for name, where in weight_map.items() if where == shard and name not in file.specs]
            if absent:
                raise CheckpointError(f"{file.path}: lacks {_some(absent)}, which the index places there")
            surplus = [name for name in file.specs if weight_map.get(name) != shard]
            if surplus:
                raise CheckpointError(
                    f"{file.path}: has surplus {_some(surplus)}, which the index does not place there"
                )

    def _check_specs(self, weight_map: dict[str, str]) -> None:
        for name, wanted in self.specs.items():
            file = self.shards[weight_map[name]]
            found = file.specs[name]
            if found != wanted:
                raise CheckpointError(
                    f"{file.path}: {name}: {found.dtype} {list(found.shape)}, "
                    f"but config.json implies {wanted.dtype} {list(wanted.shape)}"
                )


def load_weights(directory: str | Path, model: Transformer, *, progress: bool = True) -> None:
    """Fills every weight of `model` from `directory`: only what it has is read.

    progress: show a bar on stderr if that is a terminal.
    Raises ConfigError if the directory is of another configuration, CheckpointError as Checkpoint does."""
    checkpoint = Checkpoint(directory)
    _require_same(checkpoint.config, model.config, checkpoint.directory)
    holders = model.holders()
    wanted = {name: [s for s in (checkpoint.specs[name], _scale(checkpoint, name)) if s] for name in holders}
    total = sum(spec.num_bytes for specs in wanted.values() for spec in specs)
    by_shard: dict[str, list[str]] = {shard: [] for shard in checkpoint.shards}
    for name in wanted:
        by_shard[checkpoint.shard_of[name]].append(name)
    started = time.monotonic()
    with tqdm(
        total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="weights", disable=None if progress else True
    ) as bar:
        for shard, names in by_shard.items():
            mapped = {shard: checkpoint.shards[shard].map()} if names else {}
            for name in names:
                weight = mapped[shard][name]
                scale_spec = _scale(checkpoint, name)
                scale = None
                if scale_spec is not None:
                    scale = _mapped(checkpoint, mapped, scale_spec.name)[scale_spec.name]
                holders[name].load(weight, scale)
                bar.update(sum(spec.num_bytes for spec in wanted[name]))
    took_s = time.monotonic() - started
    log.info(
        "weights loaded: %d of %d tensors, %.2f GiB in %.1f s",
        sum(map(len, wanted.values())), len(checkpoint.specs), total / 2**30, took_s,
    )  # fmt: skip


def _mapped(checkpoint: Checkpoint, mapped: dict[str, MappedTensors], name: str) -> MappedTensors:
    shard = checkpoint.shard_of[name]
    if shard not in mapped:
        mapped[shard] = checkpoint.shards[shard].map()
    return mapped[shard]


def _scale(checkpoint: Checkpoint, name: str) -> TensorSpec | None:
    stem, found, leaf = name.rpartition(".weight")
    return checkpoint.specs.get(f"{stem}.scale") if found and not leaf else None


def _require_same(found: ModelConfig, wanted: ModelConfig, directory: Path) -> None:
    for field in ModelConfig.__struct_fields__:
        ours, theirs = getattr(wanted, field), getattr(found, field)
        if ours != theirs:
            shown = [msgspec.json.encode(value).decode() for value in (theirs, ours)]
            raise ConfigError(f"{directory / 'config.json'}: {field}={shown[0]}: the model was built for {shown[1]}")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMED])
    more = len(names) - _NAMED
    return f"{len(names)} tensors: {shown}" + (f" and {more} more" if more > 0 else "")


def rank_bytes(config: ModelConfig, experts: range) -> int:
    """Stored bytes of the tensors that a rank with `experts` loads (backbone only)."""
    return sum(
        spec.num_bytes
        for spec in inventory(config)
        if not spec.name.startswith("mtp.") and ((expert := expert_of(spec.name)) is None or expert in experts)
    )
