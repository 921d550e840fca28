"""Checks a checkpoint directory against its config.json and prints what it holds.

python -m tools.inspect_checkpoint DIR [--tensors]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.inventory import TensorSpec, expert_of
from model.state_layout import IndexFormat, RowFormat, build_state_layout
from runtime.errors import CheckpointError, ConfigError

_CLASSES = (
    ("routed experts", r"\.ffn\.experts\."),
    ("shared experts", r"\.shared_experts\."),
    ("router", r"\.ffn\.gate\."),
    ("indexers", r"\.indexer\."),
    ("compressors", r"\.compressor\."),
    ("attention", r"\.attn\."),
    ("hyper-connections", r"hc_(attn|ffn|head)_"),
    ("embedding and head", r"^(embed|head)\.weight"),
    ("MTP projections", r"\.[eh]_proj\."),
    ("norms", r"norm\.weight"),
)


def tensor_class(name: str) -> str:
    """Which line of the table a tensor belongs to."""
    return next(label for label, pattern in _CLASSES if re.search(pattern, name))


def summary(config: ModelConfig, specs: list[TensorSpec]) -> str:
    """Kinds of layers, bytes by class and dtype, bytes of one request's state."""
    kinds = Counter(config.layer_kind(layer) for layer in range(config.num_hidden_layers))
    lines = [
        f"{config.num_hidden_layers} layers: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}; "
        f"{config.num_hash_layers} route by token; {config.num_nextn_predict_layers} MTP",
        f"{'':20s} {'backbone':>20s} {'MTP':>18s}  bytes",
    ]
    sizes: Counter[tuple[str, bool]] = Counter()
    for spec in specs:
        sizes[tensor_class(spec.name), spec.name.startswith("mtp.")] += spec.num_bytes
    for label, _ in _CLASSES:
        lines.append(f"{label:20s} {sizes[label, False]:20,d} {sizes[label, True]:18,d}")
    totals = [sum(size for (_, mtp), size in sizes.items() if mtp is which) for which in (False, True)]
    lines.append(f"{'total':20s} {totals[0]:20,d} {totals[1]:18,d}")
    dtypes = Counter(spec.dtype for spec in specs)
    experts = {expert for spec in specs if (expert := expert_of(spec.name)) is not None}
    lines.append(
        f"{len(specs):,d} tensors, {sum(totals):,d} bytes, {len(experts)} experts a layer; "
        + ", ".join(f"{count:,d} {dtype}" for dtype, count in sorted(dtypes.items()))
    )
    formats: tuple[tuple[RowFormat, IndexFormat], ...] = (("fp8", "mxfp4"), ("fp8", "fp8"), ("bf16", "bf16"))
    for row_format, index_format in formats:
        layout = build_state_layout(config, row_format=row_format, index_format=index_format)
        lines.append(
            f"state, rows {row_format}, index keys {index_format}: {layout.page_bytes:,d} bytes per page of "
            f"{layout.page_tokens} tokens, {layout.slot_bytes:,d} per slot"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.inspect_checkpoint", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shard")
    options = parser.parse_args(arguments)
    try:
        checkpoint = Checkpoint(options.directory)
        print(f"{options.directory}: {len(checkpoint.shards)} shards, complete")
        print(summary(checkpoint.config, list(checkpoint.specs.values())))
    except (ConfigError, CheckpointError) as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 1
    if options.tensors:
        for spec in checkpoint.specs.values():
            shape = "x".join(map(str, spec.shape))
            print(f"{checkpoint.shard_of[spec.name]}  {spec.dtype:8s} {shape:>16s}  {spec.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
