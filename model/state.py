"""Typed views over the raw pools of pages and slots: what each layer reads and writes.

The pools are bytes that somebody else owns, allocates and transfers. Nothing here zeroes or copies them, and no byte is
read that a forward pass of the same request has not written: what is valid follows from the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packed_rows import PackedRows, PoolFormat
from model.state_layout import Region, RegionKind, StateLayout

_KV_FORMATS: dict[str, PoolFormat] = {"fp8": "kv_fp8", "bf16": "bf16", "f32": "f32"}
_KEY_FORMATS: dict[str, PoolFormat] = {"mxfp4": "key_mxfp4", "fp8": "key_fp8", "bf16": "bf16", "f32": "f32"}
_PLAIN_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True, kw_only=True, eq=False)
class OverlapState:
    """Compressor state of one CSA compressor over all slots, float32; see kernels.compressor."""

    partial: Tensor
    overlap: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerState:
    """One layer's part of the pools; what its kind does not have is None."""

    window: PackedRows
    entries: PackedRows | None = None
    index_keys: PackedRows | None = None
    compressor: OverlapState | None = None
    index_compressor: OverlapState | None = None
    pending: Tensor | None = None


class StateViews:
    """Per-layer views of `pages_u8` [num_pages, page_bytes] and `slots_u8` [num_slots, slot_bytes] (uint8)."""

    def __init__(self, layout: StateLayout, pages_u8: Tensor, slots_u8: Tensor) -> None:
        for name, pool, size in (("pages", pages_u8, layout.page_bytes), ("slots", slots_u8, layout.slot_bytes)):
            if pool.dtype != torch.uint8 or pool.dim() != 2 or pool.shape[1] != size or not pool.is_contiguous():
                raise ValueError(
                    f"{name}: need a contiguous uint8 [count, {size}], got {pool.dtype} {list(pool.shape)}"
                )
        self.layout = layout
        self.pages_u8 = pages_u8
        self.slots_u8 = slots_u8
        self._rope_dim = layout.rope_dim
        pages = {(region.layer, region.kind): region for region in layout.page_regions}
        slots = {(region.layer, region.kind): region for region in layout.slot_regions}
        num_layers = 1 + max(region.layer for region in layout.slot_regions)
        self.layers = tuple(self._layer(layer, pages, slots) for layer in range(num_layers))

    def _layer(
        self,
        layer: int,
        pages: dict[tuple[int, RegionKind], Region],
        slots: dict[tuple[int, RegionKind], Region],
    ) -> LayerState:
        entries, keys = pages.get((layer, "entries")), pages.get((layer, "index_keys"))
        pending = slots.get((layer, "pending"))
        return LayerState(
            window=self._rows(self.slots_u8, slots[layer, "window"], _KV_FORMATS, self._rope_dim),
            entries=None if entries is None else self._rows(self.pages_u8, entries, _KV_FORMATS, self._rope_dim),
            index_keys=None if keys is None else self._rows(self.pages_u8, keys, _KEY_FORMATS, 0),
            compressor=self._overlap(slots.get((layer, "partial")), slots.get((layer, "overlap"))),
            index_compressor=self._overlap(slots.get((layer, "index_partial")), slots.get((layer, "index_overlap"))),
            pending=None if pending is None else _records(self.slots_u8, pending, torch.float32),
        )

    def _rows(self, pool: Tensor, region: Region, formats: dict[str, PoolFormat], rope_dim: int) -> PackedRows:
        plain = _PLAIN_DTYPES.get(region.format)
        scales = None
        if region.scale_bytes:
            start = region.offset + region.rows * region.data_bytes
            raw = pool[:, start : start + region.rows * region.scale_bytes]
            typed = raw.view(torch.float32) if formats[region.format] == "key_fp8" else raw
            scales = typed.unflatten(1, (region.rows, -1))
        return PackedRows(
            format=formats[region.format],
            width=region.width,
            rope_dim=rope_dim,
            data=_records(pool, region, plain or torch.uint8),
            scales=scales,
        )

    def _overlap(self, partial: Region | None, overlap: Region | None) -> OverlapState | None:
        if partial is None or overlap is None:
            return None
        return OverlapState(
            partial=_records(self.slots_u8, partial, torch.float32).unflatten(2, (2, -1)),
            overlap=_records(self.slots_u8, overlap, torch.float32).unflatten(2, (2, -1)),
        )


def _records(pool: Tensor, region: Region, dtype: torch.dtype) -> Tensor:
    """[P, rows, record] view of a region's data records."""
    raw = pool[:, region.offset : region.offset + region.rows * region.data_bytes]
    return raw.view(dtype).unflatten(1, (region.rows, -1))
