"""Which model a rank runs, as a short string two nodes can compare: weights, arithmetic and everything between."""

from pathlib import Path

import msgspec
import xxhash

from engine.config import EngineConfig
from model.config import ModelConfig

_SAMPLE_BYTES = 1 << 16
"""Of each shard's end: enough to tell other weights of the same shapes, cheap on a cold 150 GB checkpoint."""


def model_fingerprint(config: EngineConfig, model: ModelConfig) -> str:
    """32 hex digits, equal where state is interchangeable. `config` has its "auto" values resolved."""
    digest = xxhash.xxh3_128()
    digest.update(msgspec.json.encode(model, order="deterministic"))
    digest.update(f"{config.numerics} {config.dtype} {config.load_format}".encode())
    if config.load_format == "dummy":
        digest.update(str(config.seed).encode())
        return digest.hexdigest()
    for shard in sorted(Path(config.model).glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        with shard.open("rb") as file:
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
