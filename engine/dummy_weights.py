"""Seeded random weights in place of a checkpoint, quantised as one would hold them, drawn on the model's device.

On a CPU they are those that `tools.make_checkpoint` writes. Experts in the order of the Hopper kernel are drawn in that
order: packing the experts of a whole model takes longer than most benchmarks.
"""

import torch

from kernels.quantize import quantize_fp4, quantize_fp8_tiles
from model.config import EXPERT_GROUP, QUANT_TILE, ModelConfig
from model.inventory import TensorSpec, inventory
from model.linear import WeightHolder
from model.random_weights import random_weight
from model.transformer import Transformer


def load_dummy_weights(model: Transformer, config: ModelConfig, seed: int) -> None:
    """Fill every weight of `model`. The same seed gives the same weights on the same kind of device, however many ranks
    share the experts."""
    specs = {spec.name: spec for spec in inventory(config)}
    drawn = {f"layers.{number}.ffn.experts." for number, layer in enumerate(model.layers)
             if layer.ffn.bank.fill_random(f"layers.{number}.ffn.experts", seed)}  # fmt: skip
    for name, holder in model.holders().items():
        if name.partition(".experts.")[0] + ".experts." not in drawn:
            _load(holder, specs[name], config, seed, model.device)


def _load(holder: WeightHolder, spec: TensorSpec, config: ModelConfig, seed: int, device: torch.device) -> None:
    value = random_weight(spec, config, seed, device)
    if spec.dtype == "F8_E4M3":
        codes, scales = quantize_fp8_tiles(value, QUANT_TILE)
        holder.load(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu))
    elif spec.dtype == "I8":
        codes, scales = quantize_fp4(value, EXPERT_GROUP)
        holder.load(codes.view(torch.int8), scales.view(torch.float8_e8m0fnu))
    else:
        holder.load(value, None)
