"""Where every byte of a request's state lies: rows per layer kind, offsets in a page and in a slot. No torch.

A *page* holds the compressed history of `page_tokens` tokens, all layers of it contiguously (block-major). A *slot*
holds what is fixed in size per request: window rings, compressor states, MTP streams.

Packed FP8 row area of R rows: R data records (e4m3 of the plain channels, then bf16 of the rotary ones) followed by R
scale records (one E8M0 byte per 64 plain channels, zero-padded to a multiple of 8). MXFP4 index keys: R records of
nibbles, then R records of E8M0 bytes; FP8 index keys: R records of e4m3, then R float32 scales. Other formats are plain
rows. 584 and 68 bytes a row for Flash.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from model.config import CSA_RATIO, ModelConfig
from runtime.errors import ConfigError

RowFormat = Literal["fp8", "bf16", "f32"]
IndexFormat = Literal["mxfp4", "fp8", "bf16", "f32"]
RegionKind = Literal[
    "entries",  # page: compressed KV rows of a CSA or HCA layer
    "index_keys",  # page: indexer keys of a CSA layer
    "window",  # slot: ring of the last `sliding_window` KV rows, row = position mod window
    "partial",  # slot, CSA: [4, 2, 2 * dim] float32, (value, score) of the open block's tokens, row = position mod 4
    "overlap",  # slot, CSA: [4, 2, dim] float32, (value, score) A halves of the last closed block
    "index_partial",  # slot, CSA: the indexer's partial rows
    "index_overlap",  # slot, CSA: the indexer's overlap rows
    "pending",  # slot, HCA: [3, dim] float32, running maximum, sum and weighted sum of the open block
    "streams",  # slot, MTP: [hc_mult, hidden] bfloat16 or float32, the backbone's streams at the last position
]

FP8_BLOCK = 64
FP4_BLOCK = 32
ALIGNMENT = 128
"""Every region, page and slot starts on a multiple of this many bytes."""


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A run of equal records of one layer inside a page or a slot."""

    kind: RegionKind
    layer: int
    """Backbone layer, or num_hidden_layers + k for MTP block k."""
    format: str
    """A row format, an index format, or "f32" for compressor state."""
    rows: int
    width: int
    """Elements a row."""
    offset: int
    """Bytes from the start of the page or slot."""
    data_bytes: int
    """Bytes of one data record."""
    scale_bytes: int
    """Bytes of one scale record; 0 if the format has none. Scale records follow all data records."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the region without alignment padding."""
        return self.rows * (self.data_bytes + self.scale_bytes)


class StateLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Pages and slots of one model in one pair of formats. Equal inputs give equal layouts on every machine."""

    row_format: RowFormat
    index_format: IndexFormat
    rope_dim: int
    """Rotary channels at the end of every KV row."""
    page_tokens: int
    page_bytes: int
    slot_bytes: int
    page_regions: tuple[Region, ...]
    slot_regions: tuple[Region, ...]

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold the compressed history of `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)


def row_record(config: ModelConfig, row_format: RowFormat) -> tuple[int, int]:
    """(data, scale) bytes of one KV row."""
    if row_format == "fp8":
        data = config.nope_head_dim + 2 * config.qk_rope_head_dim
        return data, _round_up(config.nope_head_dim // FP8_BLOCK, 8)
    return config.head_dim * (2 if row_format == "bf16" else 4), 0


def key_record(config: ModelConfig, index_format: IndexFormat) -> tuple[int, int]:
    """(data, scale) bytes of one index key."""
    dim = config.index_head_dim
    return {"mxfp4": (dim // 2, dim // FP4_BLOCK), "fp8": (dim, 4), "bf16": (2 * dim, 0), "f32": (4 * dim, 0)}[
        index_format
    ]


def build_state_layout(
    config: ModelConfig,
    *,
    row_format: RowFormat,
    index_format: IndexFormat,
    page_tokens: int = 256,
    include_mtp: bool = True,
) -> StateLayout:
    """Lays out one page and one slot. Raises ConfigError where the formats or the page size do not fit the model."""
    if row_format == "fp8" and config.nope_head_dim % FP8_BLOCK:
        raise ConfigError(
            f"head_dim={config.head_dim}: fp8 rows need a multiple of {FP8_BLOCK} plain channels, "
            f"not {config.nope_head_dim}"
        )
    ratios = {ratio for ratio in config.compress_ratios if ratio}
    if page_tokens <= 0 or any(page_tokens % ratio for ratio in ratios):
        raise ConfigError(f"page_tokens={page_tokens}: must be a multiple of every compress ratio {sorted(ratios)}")

    row, key = row_record(config, row_format), key_record(config, index_format)
    page, slot = _Record(), _Record()
    num_layers = config.num_hidden_layers + (config.num_nextn_predict_layers if include_mtp else 0)
    for layer in range(num_layers):
        ratio, dim, index_dim = config.compress_ratios[layer], config.head_dim, config.index_head_dim
        slot.add("window", layer, row_format, config.sliding_window, dim, row)
        if config.layer_kind(layer) == "csa":
            page.add("entries", layer, row_format, page_tokens // ratio, dim, row)
            page.add("index_keys", layer, index_format, page_tokens // ratio, index_dim, key)
            slot.add_float32("partial", layer, CSA_RATIO, 4 * dim)
            slot.add_float32("overlap", layer, CSA_RATIO, 2 * dim)
            slot.add_float32("index_partial", layer, CSA_RATIO, 4 * index_dim)
            slot.add_float32("index_overlap", layer, CSA_RATIO, 2 * index_dim)
        elif config.layer_kind(layer) == "hca":
            page.add("entries", layer, row_format, page_tokens // ratio, dim, row)
            slot.add_float32("pending", layer, 3, dim)
        if layer >= config.num_hidden_layers:
            wide = row_format == "f32"
            slot.add("streams", layer, "f32" if wide else "bf16", config.hc_mult, config.hidden_size,
                     (config.hidden_size * (4 if wide else 2), 0))  # fmt: skip
    return StateLayout(
        row_format=row_format,
        index_format=index_format,
        rope_dim=config.qk_rope_head_dim,
        page_tokens=page_tokens,
        # A window-only model has nothing to page; its pages stay addressable so that nobody needs a special case.
        page_bytes=max(page.size, ALIGNMENT),
        slot_bytes=slot.size,
        page_regions=tuple(page.regions),
        slot_regions=tuple(slot.regions),
    )


class _Record:
    """A page or slot under construction."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.size = 0

    def add(self, kind: RegionKind, layer: int, format: str, rows: int, width: int, record: tuple[int, int]) -> None:
        data_bytes, scale_bytes = record
        region = Region(kind=kind, layer=layer, format=format, rows=rows, width=width, offset=self.size,
                        data_bytes=data_bytes, scale_bytes=scale_bytes)  # fmt: skip
        self.regions.append(region)
        self.size = _round_up(self.size + region.num_bytes, ALIGNMENT)

    def add_float32(self, kind: RegionKind, layer: int, rows: int, width: int) -> None:
        self.add(kind, layer, "f32", rows, width, (4 * width, 0))


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
