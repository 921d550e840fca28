"""Every tensor of a released-format checkpoint, from the configuration alone: name, shape, stored dtype. No torch.

`X.scale` accompanies a quantised `X.weight`. FP8 weights have a scale per 128 x 128 tile, packed FP4 expert rows (two
codes a byte) one per 32 input columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from model.config import CSA_RATIO, EXPERT_GROUP, QUANT_TILE, ModelConfig

DTYPE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I64": 8, "I8": 1}
"""Stored dtypes, as safetensors spells them."""


class TensorSpec(NamedTuple):
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def inventory(config: ModelConfig) -> Iterator[TensorSpec]:
    """All tensors, in the order in which they are written."""
    hidden, hc = config.hidden_size, config.hc_mult
    yield TensorSpec("embed.weight", (config.vocab_size, hidden), "BF16")
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer, f"layers.{layer}")
    yield TensorSpec("norm.weight", (hidden,), "BF16")
    yield from _hyper("hc_head", hc, hc * hidden, 1)
    yield TensorSpec("head.weight", (config.vocab_size, hidden), "BF16")
    for block in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{block}"
        yield from _layer(config, config.num_hidden_layers + block, prefix)
        yield from _fp8(f"{prefix}.e_proj", hidden, hidden)
        yield from _fp8(f"{prefix}.h_proj", hidden, hidden)
        for norm in ("enorm", "hnorm", "norm"):
            yield TensorSpec(f"{prefix}.{norm}.weight", (hidden,), "BF16")
        yield from _hyper(f"{prefix}.hc_head", hc, hc * hidden, 1)


def expert_of(name: str) -> int | None:
    """The routed expert a tensor belongs to, if it belongs to one."""
    _, found, rest = name.partition(".ffn.experts.")
    return int(rest.partition(".")[0]) if found else None


def _layer(config: ModelConfig, layer: int, prefix: str) -> Iterator[TensorSpec]:
    hidden, hc = config.hidden_size, config.hc_mult
    for part in ("attn", "ffn"):
        yield from _hyper(f"{prefix}.hc_{part}", (2 + hc) * hc, hc * hidden, 3)
        yield TensorSpec(f"{prefix}.{part}_norm.weight", (hidden,), "BF16")
    yield from _attention(config, layer, f"{prefix}.attn")
    yield from _moe(config, layer, f"{prefix}.ffn")


def _attention(config: ModelConfig, layer: int, prefix: str) -> Iterator[TensorSpec]:
    hidden, heads, dim, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    output_rank = config.o_groups * config.o_lora_rank
    yield TensorSpec(f"{prefix}.attn_sink", (heads,), "F32")
    yield TensorSpec(f"{prefix}.q_norm.weight", (rank,), "BF16")
    yield TensorSpec(f"{prefix}.kv_norm.weight", (dim,), "BF16")
    yield from _fp8(f"{prefix}.wq_a", rank, hidden)
    yield from _fp8(f"{prefix}.wq_b", heads * dim, rank)
    yield from _fp8(f"{prefix}.wkv", dim, hidden)
    yield from _fp8(f"{prefix}.wo_a", output_rank, config.heads_per_group * dim)
    yield from _fp8(f"{prefix}.wo_b", hidden, output_rank)
    kind, ratio = config.layer_kind(layer), config.compress_ratios[layer]
    if kind == "hca":
        yield from _compressor(f"{prefix}.compressor", ratio, dim, dim, hidden)
    if kind == "csa":
        index_dim, index_heads = config.index_head_dim, config.index_n_heads
        yield from _compressor(f"{prefix}.compressor", CSA_RATIO, 2 * dim, dim, hidden)
        yield from _fp8(f"{prefix}.indexer.wq_b", index_heads * index_dim, rank)
        yield TensorSpec(f"{prefix}.indexer.weights_proj.weight", (index_heads, hidden), "BF16")
        yield from _compressor(f"{prefix}.indexer.compressor", CSA_RATIO, 2 * index_dim, index_dim, hidden)


def _compressor(prefix: str, ratio: int, columns: int, dim: int, hidden: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.ape", (ratio, columns), "F32")
    yield TensorSpec(f"{prefix}.wkv.weight", (columns, hidden), "BF16")
    yield TensorSpec(f"{prefix}.wgate.weight", (columns, hidden), "BF16")
    yield TensorSpec(f"{prefix}.norm.weight", (dim,), "BF16")


def _moe(config: ModelConfig, layer: int, prefix: str) -> Iterator[TensorSpec]:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield TensorSpec(f"{prefix}.gate.weight", (experts, hidden), "BF16")
    if config.is_hash_layer(layer):
        yield TensorSpec(f"{prefix}.gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), "I64")
    else:
        yield TensorSpec(f"{prefix}.gate.bias", (experts,), "F32")
    for matrix, rows, columns in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
        yield from _fp8(f"{prefix}.shared_experts.{matrix}", rows, columns)
    for expert in range(experts):
        for matrix, rows, columns in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
            name = f"{prefix}.experts.{expert}.{matrix}"
            yield TensorSpec(f"{name}.weight", (rows, columns // 2), "I8")
            yield TensorSpec(f"{name}.scale", (rows, columns // EXPERT_GROUP), "F8_E8M0")


def _fp8(prefix: str, rows: int, columns: int) -> Iterator[TensorSpec]:
    tiles = (math.ceil(rows / QUANT_TILE), math.ceil(columns / QUANT_TILE))
    yield TensorSpec(f"{prefix}.weight", (rows, columns), "F8_E4M3")
    yield TensorSpec(f"{prefix}.scale", tiles, "F8_E8M0")


def _hyper(prefix: str, outputs: int, inputs: int, scales: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}_fn", (outputs, inputs), "F32")
    yield TensorSpec(f"{prefix}_base", (outputs,), "F32")
    yield TensorSpec(f"{prefix}_scale", (scales,), "F32")
