"""config.json: what is read, and that a wrong value is named before anything else happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.presets import PRESETS, flash, pro
from runtime.errors import ConfigError

WRONG_VALUES: list[tuple[str, Any]] = [
    ("hidden_size", 0),
    ("hidden_size", "4096"),
    ("hidden_size", 100),
    ("vocab_size", -1),
    ("head_dim", 64),
    ("qk_rope_head_dim", 33),
    ("num_attention_heads", 63),
    ("index_head_dim", 96),
    ("moe_intermediate_size", 40),
    ("num_experts_per_tok", 257),
    ("num_hash_layers", 44),
    ("compress_ratios", [0] * 43),
    ("compress_ratios", [0] * 43 + [4]),
    ("compress_ratios", [6] + [0] * 43),
    ("scoring_func", "softmax"),
    ("topk_method", "greedy"),
    ("norm_topk_prob", False),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("tie_word_embeddings", True),
    ("expert_dtype", "fp8"),
    ("n_shared_experts", 2),
    ("num_key_value_heads", 8),
    ("num_nextn_predict_layers", 3),
    ("model_type", "deepseek_v3"),
    ("quantization_config", {"quant_method": "gptq"}),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    ("rope_scaling", {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 65536}),
    ("rope_scaling", {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 65536}),
    ("rope_scaling", {"type": "yarn"}),
    ("rope_theta", 0),
    ("eos_token_id", 129280),
    ("eos_token_id", [1, 2]),
    ("swiglu_limit", None),
]


def released(**changes: Any) -> bytes:
    raw = json.loads(flash().to_json())
    raw.update(transformers_version="4.57.1", use_cache=True, attention_dropout=0.0, **changes)
    return json.dumps(raw).encode()


def test_released_config_is_read_whatever_else_it_says() -> None:
    assert ModelConfig.from_json(released()) == flash()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_their_own_json(preset: str, tmp_path: Path) -> None:
    config = PRESETS[preset]()
    (tmp_path / "config.json").write_bytes(config.to_json())
    assert ModelConfig.load(tmp_path) == config


def test_a_missing_expert_dtype_means_fp4() -> None:
    raw = json.loads(released())
    del raw["expert_dtype"]
    assert ModelConfig.from_json(json.dumps(raw).encode()) == flash()


def test_rope_type_is_another_spelling_of_type() -> None:
    raw = json.loads(released())
    raw["rope_scaling"]["rope_type"] = raw["rope_scaling"].pop("type")
    assert ModelConfig.from_json(json.dumps(raw).encode()) == flash()


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_json(released(**{field: value}))


@pytest.mark.parametrize("field", ["hidden_size", "compress_ratios", "swiglu_limit", "rope_theta"])
def test_a_missing_field_is_named(field: str) -> None:
    raw = json.loads(released())
    del raw[field]
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_json(json.dumps(raw).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"hidden_size": NaN}'])
def test_what_is_not_a_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(data)


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        ModelConfig.load(tmp_path)


def test_layer_kinds_of_the_released_models() -> None:
    kinds = [[config.layer_kind(layer) for layer in range(len(config.compress_ratios))] for config in (flash(), pro())]
    assert [kinds[0].count(kind) for kind in ("swa", "csa", "hca")] == [3, 21, 20]
    assert [kinds[1].count(kind) for kind in ("swa", "csa", "hca")] == [1, 30, 31]
    assert kinds[0][:5] == ["swa", "swa", "csa", "hca", "csa"]
    assert kinds[0][-1] == kinds[1][-1] == "swa"
