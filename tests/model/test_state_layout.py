"""Pages and slots: bytes of the released model, alignment, no overlap, stability."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from model.config import ModelConfig
from model.presets import flash, pro, tiny
from model.state_layout import ALIGNMENT, StateLayout, build_state_layout
from runtime.errors import ConfigError

FORMATS = list(itertools.product(("fp8", "bf16", "f32"), ("mxfp4", "fp8", "bf16", "f32")))


def num_bytes(layout: StateLayout, place: str, *kinds: str) -> int:
    return sum(region.num_bytes for region in getattr(layout, f"{place}_regions") if region.kind in kinds)


def test_row_sizes_of_flash_are_the_published_ones() -> None:
    for row_format, index_format, row, key in (
        ("fp8", "mxfp4", 584, 68),
        ("fp8", "fp8", 584, 132),
        ("bf16", "bf16", 1024, 256),
    ):
        layout = build_state_layout(flash(), row_format=row_format, index_format=index_format)
        entries = [region for region in layout.page_regions if region.kind == "entries"]
        keys = [region for region in layout.page_regions if region.kind == "index_keys"]
        assert {region.data_bytes + region.scale_bytes for region in entries} == {row}
        assert {region.data_bytes + region.scale_bytes for region in keys} == {key}
        assert sorted({region.rows for region in entries}) == [2, 64]
        assert (len(entries), len(keys)) == (41, 21)


def test_bytes_of_flash_pages_and_slots() -> None:
    layout = build_state_layout(flash(), row_format="fp8", index_format="mxfp4")
    # 3,514.25 bytes a token, as published, times 256.
    assert num_bytes(layout, "page", "entries", "index_keys") == 899_648 == 3514.25 * 256
    assert layout.page_bytes == 901_888
    assert num_bytes(layout, "slot", "window") == 44 * 128 * 584
    assert num_bytes(layout, "slot", "overlap") == 344_064
    assert num_bytes(layout, "slot", "index_overlap") == 86_016
    assert num_bytes(layout, "slot", "pending") == 122_880
    assert num_bytes(layout, "slot", "streams") == 32_768
    # The published worst case holds three partial rows; the slot has a place for the fourth while a block closes.
    assert num_bytes(layout, "slot", "partial") * 3 // 4 == 516_096
    assert num_bytes(layout, "slot", "index_partial") * 3 // 4 == 129_024
    assert layout.slot_bytes == 4_734_976


@pytest.mark.parametrize(("row_format", "index_format"), FORMATS)
@pytest.mark.parametrize("preset", [tiny, flash, pro])
def test_regions_are_aligned_and_do_not_overlap(preset, row_format: str, index_format: str) -> None:
    layout = build_state_layout(preset(), row_format=row_format, index_format=index_format)
    for regions, size in ((layout.page_regions, layout.page_bytes), (layout.slot_regions, layout.slot_bytes)):
        end = 0
        for region in regions:
            assert region.offset % ALIGNMENT == 0
            assert region.offset >= end
            end = region.offset + region.num_bytes
        assert end <= size < end + ALIGNMENT
        assert size % ALIGNMENT == 0


def test_layout_is_equal_on_every_run_and_survives_json() -> None:
    layout = build_state_layout(tiny(), row_format="fp8", index_format="mxfp4")
    assert build_state_layout(tiny(), row_format="fp8", index_format="mxfp4") == layout
    assert msgspec.json.decode(msgspec.json.encode(layout), type=StateLayout) == layout


def test_mtp_regions_are_left_out_on_request() -> None:
    without = build_state_layout(flash(), row_format="fp8", index_format="mxfp4", include_mtp=False)
    assert max(region.layer for region in without.slot_regions) == 42
    assert without.slot_bytes == 4_734_976 - 128 * 584 - 32_768


def test_a_window_only_model_still_has_pages() -> None:
    config: ModelConfig = msgspec.structs.replace(tiny(), compress_ratios=(0,) * 7)
    layout = build_state_layout(config, row_format="bf16", index_format="bf16")
    assert layout.page_regions == ()
    assert layout.page_bytes == ALIGNMENT


@pytest.mark.parametrize("page_tokens", [0, -256, 8, 24, 100])
def test_pages_that_cut_a_block_are_refused(page_tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"page_tokens={page_tokens}"):
        build_state_layout(tiny(), row_format="bf16", index_format="bf16", page_tokens=page_tokens)


def test_fp8_rows_need_whole_scale_blocks() -> None:
    config: ModelConfig = msgspec.structs.replace(tiny(), head_dim=96)
    with pytest.raises(ConfigError, match="head_dim=96"):
        build_state_layout(config, row_format="fp8", index_format="mxfp4")


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (256, 1), (257, 2), (1_048_576, 4096)])
def test_pages_for_tokens(tokens: int, pages: int) -> None:
    assert build_state_layout(tiny(), row_format="bf16", index_format="bf16").pages_for(tokens) == pages
