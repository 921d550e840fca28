"""Writes a checkpoint with seeded random weights in the released format, with a small tokenizer.

python -m tools.make_checkpoint --preset tiny --out DIR [--seed 0]
python -m tools.make_checkpoint --config some/config.json --out DIR
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from model.checkpoint_writer import write_checkpoint
from model.config import ModelConfig
from model.presets import PRESETS
from model.random_weights import random_weight
from runtime.errors import ConfigError
from tools.tiny_tokenizer import MIN_VOCAB_SIZE, write_tokenizer

MIB = 1 << 20
DEFAULT_SHARD_MIB = 3500
TINY_SHARD_MIB = 1
"""Several shards even for the tiny model, so that whoever loads it has loaded a sharded checkpoint."""


def make_checkpoint(
    directory: Path, config: ModelConfig, *, seed: int, max_shard_bytes: int, progress: bool = True
) -> None:
    """Weights, index, config and tokenizer files of one model."""
    if config.vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size={config.vocab_size}: bytes and markers alone take {MIN_VOCAB_SIZE}")
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, config.vocab_size, config.max_position_embeddings)
    write_checkpoint(
        directory,
        config,
        lambda spec: random_weight(spec, config, seed),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_checkpoint", description="Write a random checkpoint in the released format."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=sorted(PRESETS))
    source.add_argument("--config", type=Path, metavar="CONFIG_JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-mib", type=int, help=f"default {DEFAULT_SHARD_MIB}, {TINY_SHARD_MIB} for tiny")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    shard_mib = options.max_shard_mib or (TINY_SHARD_MIB if options.preset == "tiny" else DEFAULT_SHARD_MIB)
    started = time.monotonic()
    try:
        if options.preset:
            config = PRESETS[options.preset]()
        else:
            config = ModelConfig.from_json(options.config.read_bytes(), source=str(options.config))
        make_checkpoint(
            options.out, config, seed=options.seed, max_shard_bytes=shard_mib * MIB, progress=not options.quiet
        )
    except (ConfigError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {size / MIB:.1f} MiB in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
