"""Float32 logits against transformers' implementation: the whole prompt at once, in ragged chunks, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.checkpoint import Checkpoint, load_weights
from model.checkpoint_writer import write_checkpoint
from model.config import ModelConfig, RopeScaling
from model.linear import dequantize
from model.random_weights import random_weight
from model.transformer import Transformer
from tests.model.helpers import Request, pools, random_model, random_weights, run, small_config
from tests.model.oracle import oracle_model

TOLERANCE = 1e-4
YARN = RopeScaling(factor=16.0, original_max_position_embeddings=64, beta_fast=4.0)

# Scores of a few index heads are exactly zero together, and no reference defines which of the tied entries to take.
# With 4 heads every candidate is taken; with 16 no tie occurs.
CONFIGS = {
    "tiny": {},
    "window 8, HCA 8, no YaRN": {
        "sliding_window": 8,
        "compress_ratios": (0, 4, 8, 4, 8, 4, 0),
        "rope_scaling": None,
        "index_topk": 8,
    },
    "window 12, 4 index heads": {"sliding_window": 12, "index_n_heads": 4, "index_topk": 64},
    "window 9, HCA 8, short YaRN, all hashed": {
        "sliding_window": 9,
        "compress_ratios": (8, 8, 4, 8, 4, 0, 0),
        "rope_scaling": YARN,
        "num_hash_layers": 6,
    },
    "window only": {"compress_ratios": (0,) * 7, "num_hash_layers": 0, "rope_scaling": None},
    "other widths, 4 index heads, no YaRN, no hashing": {
        "head_dim": 96,
        "qk_rope_head_dim": 32,
        "index_head_dim": 64,
        "num_attention_heads": 12,
        "o_groups": 3,
        "o_lora_rank": 64,
        "hidden_size": 160,
        "num_hash_layers": 0,
        "sliding_window": 10,
        "index_n_heads": 4,
        "index_topk": 64,
        "rope_scaling": None,
        "swiglu_limit": 0.5,
    },
    "many experts, tight clamp, short YaRN": {
        "n_routed_experts": 24,
        "num_experts_per_tok": 5,
        "swiglu_limit": 0.7,
        "routed_scaling_factor": 2.5,
        "rope_scaling": YARN,
        "index_topk": 5,
        "compress_ratios": (4, 16, 4, 16, 4, 16, 0),
    },
}
NUM_TOKENS = 100
CHUNKS = {"at once": [NUM_TOKENS], "ragged": [1, 3, 7, 2, 10, 5, 33, 16, 1, 22], "decode": [1]}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str) -> None:
    config: ModelConfig = small_config(**CONFIGS[name])
    seed = sorted(CONFIGS).index(name)
    model = random_model(config, seed)
    tokens = torch.randint(config.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
    with torch.inference_mode():
        expected = oracle_model(config, random_weights(config, seed))(torch.tensor([tokens])).logits[0]
    assert 4 < expected.abs().max() < 40
    for how, chunks in CHUNKS.items():
        got = run(model, pools(config).views, Request(2, [5]), tokens, chunks)
        error = (got - expected).abs().max().item()
        assert error < TOLERANCE, f"{how}: {error:.2e}"


def test_a_loaded_checkpoint_equals_transformers_with_the_dequantised_weights(tmp_path: Path) -> None:
    config, seed = small_config(), 7
    write_checkpoint(
        tmp_path, config, lambda spec: random_weight(spec, config, seed), max_shard_bytes=600_000, progress=False
    )
    model = Transformer(config)
    load_weights(tmp_path, model, progress=False)
    checkpoint = Checkpoint(tmp_path)
    values = {}
    for name in random_weights(config, seed):
        mapped = checkpoint.shards[checkpoint.shard_of[name]].map()
        scale = name.removesuffix(".weight") + ".scale"
        values[name] = dequantize(mapped[name], mapped[scale] if scale in checkpoint.specs else None).clone()
        if values[name].is_floating_point():
            values[name] = values[name].float()
    tokens = list(range(90))
    with torch.inference_mode():
        expected = oracle_model(config, values)(torch.tensor([tokens])).logits[0]
    got = run(model, pools(config).views, Request(0, [1]), tokens, [50])
    assert (got - expected).abs().max() < 1e-4
