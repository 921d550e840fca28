"""How many pages and which length fit, and what is said when they do not."""

import pytest
import torch

from engine.config import EngineConfig
from engine.loader import eos_ids, resolve
from engine.memory import PoolSizes, StateMemory, plan_pools
from model.presets import flash, tiny
from model.state_layout import build_state_layout
from runtime.config import convert
from runtime.errors import ConfigError

MODEL = tiny()
LAYOUT = build_state_layout(MODEL, row_format="f32", index_format="f32", page_tokens=32)


def plan(budget_bytes=10**9, holds_states=False, **settings):
    config = EngineConfig(model="", block_size=32, **{"max_num_seqs": 4, "max_held_requests": 3, **settings})
    return plan_pools(config, MODEL, LAYOUT, holds_states=holds_states, budget_bytes=budget_bytes)


def test_explicit_numbers_are_taken_as_they_are():
    assert plan(num_pages=100, max_model_len=1000) == PoolSizes(num_pages=100, num_slots=4, max_model_len=1000)


def test_held_states_have_slots_of_their_own():
    assert plan(num_pages=100, holds_states=True).num_slots == 7


def test_pages_fill_the_budget_that_slots_leave():
    budget = (4 + 1) * LAYOUT.slot_bytes + 50 * LAYOUT.page_bytes + 1
    assert plan(budget).num_pages == 50


def test_no_more_pages_are_made_than_requests_can_use():
    assert plan(10**12, max_model_len=100).num_pages == 4 * 4


def test_auto_length_leaves_a_page_to_each_of_the_others():
    assert plan(num_pages=100).max_model_len == 97 * 32
    assert plan(num_pages=4).max_model_len == 2 * 32, "but never takes less than half"
    assert plan(num_pages=10**6).max_model_len == MODEL.max_position_embeddings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 10**6}, "exceeds the model's limit of 16384"),
        ({"max_model_len": 1000, "num_pages": 31}, "needs 32 pages of 32 tokens and there are 31"),
        ({"budget_bytes": 1000}, "do not hold 4 slots"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(settings, words):
    with pytest.raises(ConfigError, match=words):
        plan(**settings)


def test_flash_fits_an_h200_as_documented():
    layout = build_state_layout(flash(), row_format="fp8", index_format="mxfp4")
    config = EngineConfig(model="", max_num_seqs=512, max_num_batched_tokens=512)
    sizes = plan_pools(config, flash(), layout, holds_states=False, budget_bytes=90 * 2**30)
    assert sizes.max_model_len == flash().max_position_embeddings
    assert sizes.num_pages * layout.page_bytes + sizes.num_slots * layout.slot_bytes <= 90 * 2**30


def test_memory_has_the_shape_the_transfer_is_told():
    memory = StateMemory.allocate(PoolSizes(5, 3, 100), LAYOUT, torch.device("cpu"))
    assert (memory.pages.shape, memory.slots.shape) == ((5, LAYOUT.page_bytes), (3 + 1, LAYOUT.slot_bytes))
    assert memory.pages.is_contiguous()
    assert memory.pages.dtype == memory.slots.dtype == torch.uint8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0: must be at least 1"),
        (
            {"max_num_seqs": 100, "max_num_batched_tokens": 99},
            "max_num_batched_tokens=99: must be at least max_num_seqs",
        ),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"long_prefill_share": 0.0}, "long_prefill_share=0.0"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"num_pages": "many"}, "num_pages"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype"),
        ({"page_sise": 4}, "page_sise"),
        ({"stats_interval_s": 0.0}, "stats_interval_s=0.0"),
    ],
)
def test_bad_settings_are_refused_with_their_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        convert({"model": "m", **settings}, EngineConfig, where="test")


def test_formats_follow_numerics_and_dtype():
    def formats(**settings):
        config = resolve(EngineConfig(model="", device="cpu", **settings), rank=0)
        return config.dtype, config.kv_cache_dtype, config.index_cache_dtype

    assert formats() == ("float32", "fp8", "mxfp4")
    assert formats(numerics="plain") == ("float32", "f32", "f32")
    assert formats(numerics="plain", dtype="bfloat16") == ("bfloat16", "bf16", "bf16")
    assert formats(kv_cache_dtype="bf16") == ("float32", "bf16", "mxfp4")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, "wide"), ({"output_projection": "fp8"}, "fp8"), ({"numerics": "plain"}, "wide")],
)
def test_the_first_output_projection_is_quantised_where_asked_and_on_gpus(settings, wanted):
    assert resolve(EngineConfig(model="", device="cpu", **settings), rank=0).output_projection == wanted


@pytest.mark.parametrize(
    ("content", "wanted"),
    [('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [3, 9]}', (3, 9)), ("{}", (1,)), ('{"eos_token_id": []}', (1,))],
)
def test_eos_ids_come_from_the_generation_config(tmp_path, content, wanted):
    (tmp_path / "generation_config.json").write_text(content)
    assert eos_ids(tmp_path, MODEL) == wanted


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "x"}', '{"eos_token_id": 99999}'])
def test_a_broken_generation_config_is_refused(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        eos_ids(tmp_path, MODEL)


def test_without_a_generation_config_the_model_says_its_eos(tmp_path):
    assert eos_ids(tmp_path, MODEL) == (MODEL.eos_token_id,)
