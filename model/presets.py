"""Known configurations: the two released models and the tiny one that tests and demos run. No torch."""

from __future__ import annotations

from collections.abc import Callable

from model.config import ModelConfig, RopeScaling


def flash() -> ModelConfig:
    """DeepSeek-V4-Flash as released."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=4096,
        num_hidden_layers=43,
        num_attention_heads=64,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        sliding_window=128,
        compress_ratios=(0, 0, *((4, 128) * 20), 4, 0),
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=6,
        routed_scaling_factor=1.5,
        num_hash_layers=3,
        swiglu_limit=10.0,
        max_position_embeddings=1048576,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65536),
        num_nextn_predict_layers=1,
    )


def pro() -> ModelConfig:
    """DeepSeek-V4-Pro as released."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1536,
        o_groups=16,
        o_lora_rank=1024,
        sliding_window=128,
        compress_ratios=(128, 128, *((4, 128) * 29), 4, 0),
        index_n_heads=64,
        index_head_dim=128,
        index_topk=1024,
        moe_intermediate_size=3072,
        n_routed_experts=384,
        num_experts_per_tok=6,
        routed_scaling_factor=2.5,
        num_hash_layers=3,
        swiglu_limit=10.0,
        max_position_embeddings=1048576,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65536),
        num_nextn_predict_layers=1,
    )


def tiny(vocab_size: int = 1024) -> ModelConfig:
    """Every feature of Flash at a size a laptop core decodes in milliseconds: two layers of each attention kind, hash
    and scored routing, YaRN, an MTP block, every quantised tensor format."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=128,
        sliding_window=16,
        compress_ratios=(0, 4, 16, 4, 16, 0, 0),
        index_n_heads=16,
        index_head_dim=128,
        index_topk=16,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        num_hash_layers=3,
        swiglu_limit=10.0,
        max_position_embeddings=16384,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=4096),
        num_nextn_predict_layers=1,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "flash": flash, "pro": pro}
