"""The architecture of one checkpoint, as its config.json spells it. No torch.

Field names are the released ones. Fields whose only supported value is fixed by the architecture (activation, router
scoring, quantisation format ...) are still read, so that a checkpoint of a sibling model is refused by name instead
of being computed wrongly.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from runtime.errors import ConfigError

LayerKind = Literal["swa", "csa", "hca"]

CSA_RATIO = 4
QUANT_TILE = 128
"""Rows and columns that share one scale in an FP8 weight."""
EXPERT_GROUP = 32
"""Input columns that share one scale in an FP4 expert row."""


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """YaRN, used by the layers that compress."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    type: str = "yarn"


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the released weights are stored."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    scale_fmt: str = "ue8m0"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (QUANT_TILE, QUANT_TILE)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """DeepSeek-V4 (Flash, Pro, or a small model of the same architecture).

    Sizes are in elements, lengths in tokens. Raises ConfigError, naming the field, for any value that is not served.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    """Backbone layers; MTP blocks are not counted."""
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    """The last channels of every head, rotated."""
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    """Per group."""
    sliding_window: int
    """Keys a query sees in the window, itself included."""
    compress_ratios: tuple[int, ...]
    """Per layer, then per MTP block: 0 window only, 4 CSA, a larger multiple of 4 HCA."""
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    num_hash_layers: int
    swiglu_limit: float
    max_position_embeddings: int
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling | None = None

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 0
    bos_token_id: int = 0
    eos_token_id: int = 1
    n_shared_experts: int = 1
    num_key_value_heads: int = 1
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    expert_dtype: str = "fp4"
    quantization_config: QuantizationConfig = QuantizationConfig()
    initializer_range: float = 0.02
    torch_dtype: str = "bfloat16"
    model_type: str = "deepseek_v4"
    architectures: tuple[str, ...] = ("DeepseekV4ForCausalLM",)

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_json(cls, data: bytes, *, source: str = "config.json") -> ModelConfig:
        """Decodes one config.json. Keys that say nothing about the architecture are ignored."""
        try:
            raw: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
            scaling = raw.get("rope_scaling")
            if isinstance(scaling, dict) and "type" not in scaling and "rope_type" in scaling:
                raw["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
            return msgspec.convert(raw, type=cls)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Reads `directory`/config.json."""
        path = Path(directory) / "config.json"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        return cls.from_json(data, source=str(path))

    def to_json(self) -> bytes:
        """config.json, one field a line."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def layer_kind(self, layer: int) -> LayerKind:
        """`layer` counts the backbone, then the MTP blocks."""
        ratio = self.compress_ratios[layer]
        return "swa" if ratio == 0 else "csa" if ratio == CSA_RATIO else "hca"

    def is_hash_layer(self, layer: int) -> bool:
        """Whether the layer routes by token id instead of by score."""
        return layer < self.num_hash_layers

    @property
    def nope_head_dim(self) -> int:
        """Channels of a head that are not rotated."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def heads_per_group(self) -> int:
        """Attention heads that share one block of the grouped output projection."""
        return self.num_attention_heads // self.o_groups


_FIXED: dict[str, tuple[object, ...]] = {
    "n_shared_experts": (1,),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "expert_dtype": ("fp4",),
    "model_type": ("deepseek_v4",),
    "num_nextn_predict_layers": (0, 1),
    "quantization_config": (QuantizationConfig(),),
}
_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "routed_scaling_factor", "swiglu_limit",
    "max_position_embeddings", "rope_theta", "compress_rope_theta", "hc_mult", "hc_sinkhorn_iters", "hc_eps",
    "rms_norm_eps",
)  # fmt: skip


def _check(config: ModelConfig) -> None:
    def require(field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(config, field)
            shown = msgspec.json.encode(value).decode() if isinstance(value, msgspec.Struct) else repr(value)
            raise ConfigError(f"{field}={shown}: {rule}")

    for field, allowed in _FIXED.items():
        shown = " or ".join(map(repr, allowed))
        require(field, getattr(config, field) in allowed, f"this model is only served with {shown}")
    for field in _POSITIVE:
        value = getattr(config, field)
        require(field, value > 0 and math.isfinite(value), "must be positive and finite")

    c = config
    require("qk_rope_head_dim", c.qk_rope_head_dim % 2 == 0, "rotary channels come in pairs")
    require("qk_rope_head_dim", c.qk_rope_head_dim < c.head_dim, f"must be below head_dim={c.head_dim}")
    require("qk_rope_head_dim", c.qk_rope_head_dim <= c.index_head_dim, f"exceeds index_head_dim={c.index_head_dim}")
    require("index_head_dim", c.index_head_dim & (c.index_head_dim - 1) == 0, "the Hadamard transform needs 2^n")
    require("index_head_dim", c.index_head_dim % EXPERT_GROUP == 0, f"must be a multiple of {EXPERT_GROUP}")
    require("num_attention_heads", c.num_attention_heads % c.o_groups == 0, f"must divide by o_groups={c.o_groups}")
    require("hidden_size", c.hidden_size % EXPERT_GROUP == 0, f"FP4 experts need a multiple of {EXPERT_GROUP}")
    require("moe_intermediate_size", c.moe_intermediate_size % EXPERT_GROUP == 0,
            f"FP4 experts need a multiple of {EXPERT_GROUP}")  # fmt: skip
    require("num_experts_per_tok", c.num_experts_per_tok <= c.n_routed_experts,
            f"exceeds n_routed_experts={c.n_routed_experts}")  # fmt: skip
    require("num_hash_layers", 0 <= c.num_hash_layers <= c.num_hidden_layers,
            f"must lie in 0..num_hidden_layers={c.num_hidden_layers}")  # fmt: skip
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    require("compress_ratios", len(c.compress_ratios) == layers,
            f"{len(c.compress_ratios)} entries for {c.num_hidden_layers} layers "
            f"and {c.num_nextn_predict_layers} MTP blocks")  # fmt: skip
    require("compress_ratios", all(r >= 0 and r % CSA_RATIO == 0 for r in c.compress_ratios),
            f"every ratio must be 0, {CSA_RATIO} or a larger multiple of {CSA_RATIO}")  # fmt: skip
    require("compress_ratios", not any(c.compress_ratios[c.num_hidden_layers :]), "an MTP block is window-only (0)")
    for field in ("bos_token_id", "eos_token_id"):
        require(field, 0 <= getattr(c, field) < c.vocab_size, f"outside the vocabulary of {c.vocab_size}")
    if c.rope_scaling is not None:
        scaling = c.rope_scaling
        require("rope_scaling", scaling.type == "yarn", "only YaRN is served")
        require("rope_scaling", scaling.factor >= 1, "factor must be at least 1")
        require("rope_scaling", scaling.original_max_position_embeddings > 0,
                "original_max_position_embeddings must be positive")  # fmt: skip
        require("rope_scaling", scaling.beta_fast >= scaling.beta_slow > 0, "needs beta_fast >= beta_slow > 0")
