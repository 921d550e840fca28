"""transformers' DeepseekV4ForCausalLM with the weights of one of our models: an independent float32 implementation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.config import ModelConfig

if TYPE_CHECKING:
    from transformers import DeepseekV4ForCausalLM

_KINDS = {
    "swa": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
_SAME_FIELDS = (
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "head_dim", "q_lora_rank", "num_experts_per_tok", "n_routed_experts", "routed_scaling_factor",
    "max_position_embeddings", "rope_theta", "compress_rope_theta", "hc_mult", "hc_sinkhorn_iters", "hc_eps",
    "swiglu_limit", "sliding_window", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim",
    "index_topk", "rms_norm_eps",
)  # fmt: skip
_RENAMES = (
    (r"^embed\.weight$", "model.embed_tokens.weight"),
    (r"^head\.weight$", "lm_head.weight"),
    (r"^norm\.weight$", "model.norm.weight"),
    (r"^hc_head_(fn|base|scale)$", r"model.hc_head.hc_\1"),
    (r"^layers\.", "model.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.indexer\.compressor\.", ".compressor.indexer."),
    (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.self_attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_sink$", ".sinks"),
    (r"(compressor.*)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.self_attn\.wq_b\.", ".self_attn.q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
)


def oracle_model(config: ModelConfig, weights: dict[str, Tensor]) -> DeepseekV4ForCausalLM:
    """`weights`: dequantised values by checkpoint name, MTP left out."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM  # takes six seconds: for those who ask only

    layers = range(config.num_hidden_layers)
    scaling = config.rope_scaling
    rope = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
    ratios = {config.layer_kind(layer): config.compress_ratios[layer] for layer in layers}
    oracle_config = DeepseekV4Config(
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        qk_rope_head_dim=config.qk_rope_head_dim,
        layer_types=[_KINDS[config.layer_kind(layer)] for layer in layers],
        compress_rates={_KINDS["csa"]: 4, _KINDS["hca"]: ratios.get("hca", 128)},
        mlp_layer_types=["hash_moe" if config.is_hash_layer(layer) else "moe" for layer in layers],
        rope_parameters=rope,
        attn_implementation="eager",
    )
    model = DeepseekV4ForCausalLM(oracle_config).float().eval()
    missing, unexpected = model.load_state_dict(_renamed(config, weights), strict=False)
    missing = [name for name in missing if "inv_freq" not in name]
    assert not missing, missing
    assert not unexpected, unexpected
    return model


def _renamed(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.startswith("mtp.") or ".experts." in name:
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    for layer in range(config.num_hidden_layers):

        def stacked(matrix: str, layer: int = layer) -> Tensor:
            return torch.stack(
                [weights[f"layers.{layer}.ffn.experts.{e}.{matrix}.weight"] for e in range(config.n_routed_experts)]
            )

        experts = f"model.layers.{layer}.mlp.experts"
        state[f"{experts}.gate_up_proj"] = torch.cat((stacked("w1"), stacked("w3")), 1)
        state[f"{experts}.down_proj"] = stacked("w2")
    return state
