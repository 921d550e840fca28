"""Writes a checkpoint directory in the released format: shards, index and config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.quantize import quantize_fp4, quantize_fp8_tiles
from model.checkpoint import INDEX_NAME
from model.config import EXPERT_GROUP, QUANT_TILE, ModelConfig
from model.inventory import TensorSpec, inventory
from model.safetensors_file import write_safetensors


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    values: Callable[[TensorSpec], Tensor],
    *,
    max_shard_bytes: int,
    progress: bool = True,
) -> None:
    """`values(spec)` gives the unquantised values of each weight: float32, FP4 experts unpacked as [out, in], tid2eid
    as int64. Scales are made here. The index is written last: a directory with one is complete."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX_NAME).unlink(missing_ok=True)
    shards = plan_shards(config, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    (directory / "config.json").write_bytes(config.to_json())
    total = sum(spec.num_bytes for shard in shards for spec in shard)
    with tqdm(
        total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="writing", disable=None if progress else True
    ) as bar:

        def counted(specs: list[TensorSpec]) -> Iterator[Tensor]:
            for spec, tensor in zip(specs, _stored(specs, values), strict=True):
                yield tensor
                bar.update(spec.num_bytes)

        for name, specs in zip(names, shards, strict=True):
            write_safetensors(directory / name, specs, counted(specs))
    weight_map = {spec.name: name for name, specs in zip(names, shards, strict=True) for spec in specs}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def plan_shards(config: ModelConfig, max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Tensors of each shard, in order. A weight and its scale stay together, and the MTP blocks have the last shard to
    themselves, whatever its size."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    in_mtp = False
    for group in _groups(config):
        group_bytes = sum(spec.num_bytes for spec in group)
        enters_mtp = group[0].name.startswith("mtp.") and not in_mtp
        in_mtp |= enters_mtp
        full = size + group_bytes > max_shard_bytes and not in_mtp
        if shards[-1] and (full or enters_mtp):
            shards.append([])
            size = 0
        shards[-1].extend(group)
        size += group_bytes
    return shards


def _groups(config: ModelConfig) -> Iterator[list[TensorSpec]]:
    group: list[TensorSpec] = []
    for spec in inventory(config):
        if group and not spec.name.endswith(".scale"):
            yield group
            group = []
        group.append(spec)
    yield group


def _stored(specs: list[TensorSpec], values: Callable[[TensorSpec], Tensor]) -> Iterator[Tensor]:
    scales = torch.empty(0, dtype=torch.uint8)
    for spec in specs:
        if spec.name.endswith(".scale"):
            yield scales.view(torch.float8_e8m0fnu)
            continue
        value = values(spec)
        if spec.dtype == "F8_E4M3":
            codes, scales = quantize_fp8_tiles(value, QUANT_TILE)
            yield codes.view(torch.float8_e4m3fn)
        elif spec.dtype == "I8":
            packed, scales = quantize_fp4(value, EXPERT_GROUP)
            yield packed.view(torch.int8)
        else:
            yield value.to({"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}[spec.dtype])
