"""Packed batches and poisoned pools for tests of the ops that read and write pages and slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.packed_rows import PackedRows, PoolFormat, read_rows_ref

PAGE_TOKENS = 32
KV_FORMATS: tuple[PoolFormat, ...] = ("kv_fp8", "bf16", "f32")
KEY_FORMATS: tuple[PoolFormat, ...] = ("key_mxfp4", "key_fp8", "bf16", "f32")


def batch(requests: Sequence[tuple[int, int]], *, page_tokens: int = PAGE_TOKENS, seed: int = 0) -> BatchIndex:
    """requests: (tokens already there, new tokens) of each. On the CPU."""
    generator = torch.Generator().manual_seed(seed)
    contexts, counts = [context for context, _ in requests], [count for _, count in requests]
    pages = max((-(-(context + count) // page_tokens) for context, count in requests), default=0)
    order = torch.randperm(len(requests) * pages + 1, generator=generator)[: len(requests) * pages].int()
    positions = [torch.arange(context, context + count) for context, count in requests]
    return BatchIndex(
        token_request_T=torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).int(),
        positions_T=torch.cat([torch.zeros(0, dtype=torch.int64), *positions]),
        query_start=torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int(),
        context_len_B=torch.tensor(contexts, dtype=torch.int32),
        slot_ids_B=torch.randperm(len(requests) + 1, generator=generator)[: len(requests)].int(),
        page_table=order.view(len(requests), pages),
        page_tokens=page_tokens,
        one_token_each=bool(counts) and all(count == 1 for count in counts),
    )


def moved(index: BatchIndex, device: torch.device) -> BatchIndex:
    """A copy on the device, with nothing cached."""
    tensors = {
        name: getattr(index, name).to(device)
        for name in ("token_request_T", "positions_T", "query_start", "context_len_B", "slot_ids_B", "page_table")
    }
    return replace(index, **tensors, _plans={})


def pool(pages: int, rows: int, width: int, format: PoolFormat, rope_dim: int) -> PackedRows:
    """A layer's region inside larger records, poisoned: what nobody wrote is NaN or 0xFF. On the CPU."""
    data_bytes, scale_bytes = {
        "kv_fp8": (width + rope_dim, -(-(width - rope_dim) // 64 // 8) * 8),
        "key_mxfp4": (width // 2, width // 32),
        "key_fp8": (width, 4),
        "bf16": (2 * width, 0),
        "f32": (4 * width, 0),
    }[format]
    size = rows * (data_bytes + scale_bytes)
    record = torch.full((pages, -(-size // 128) * 128 + 256), 0xFF, dtype=torch.uint8)[:, 128:]
    raw = record[:, : rows * data_bytes]
    data = {"bf16": raw.view(torch.bfloat16), "f32": raw.view(torch.float32)}.get(format, raw)
    scales = None
    if scale_bytes:
        scales = record[:, rows * data_bytes : size]
        scales = (scales.view(torch.float32) if format == "key_fp8" else scales).unflatten(1, (rows, -1))
    return PackedRows(format=format, width=width, rope_dim=rope_dim, data=data.unflatten(1, (rows, -1)), scales=scales)


def pool_copy(source: PackedRows, device: torch.device) -> PackedRows:
    """The same bytes on the device, strided alike."""

    def copy(view: Tensor | None) -> Tensor | None:
        if view is None:
            return None
        base = torch.empty(view.stride(0) * view.shape[0], dtype=view.dtype, device=device)
        target = base.as_strided(view.shape, view.stride())
        target.copy_(view)
        return target

    data = copy(source.data)
    assert data is not None
    return replace(source, data=data, scales=copy(source.scales))


def raw_bytes(pool: PackedRows) -> Tensor:
    """Every byte of every row, scales included, on the CPU: uint8 [P, R, n]."""
    parts = [pool.data.cpu().contiguous().view(torch.uint8)]
    if pool.scales is not None:
        parts.append(pool.scales.cpu().contiguous().view(torch.uint8))
    return torch.cat(parts, -1)


def values(pool: PackedRows) -> Tensor:
    """All rows dequantised on the CPU, float32 [P, R, width]; what nobody wrote is NaN or 0xFF decoded."""
    here = pool_copy(pool, torch.device("cpu"))
    pages, rows = here.data.shape[:2]
    page = torch.arange(pages).repeat_interleave(rows)
    return read_rows_ref(here, page, torch.arange(rows).repeat(pages), torch.float32).unflatten(0, (pages, rows))


STEP = {"kv_fp8": 0.08, "key_fp8": 0.08, "key_mxfp4": 0.4, "bf16": 0.01, "f32": 1e-5}
"""Of the row's largest value: what one step of a format's grid may be."""


def assert_rows_agree(got: PackedRows, expected: PackedRows, *, share: float, step: float | None = None) -> None:
    """Rows nobody wrote kept every byte; of the others `share` of the values are equal and the rest a step away, for
    sums end on either side of a rounding boundary."""
    ours, theirs = raw_bytes(got), raw_bytes(expected)
    blank = (theirs == 0xFF).all(-1)
    assert torch.equal(ours[blank], theirs[blank])
    left, right = values(got)[~blank], values(expected)[~blank]
    if not right.numel():
        return
    assert bool(right.isfinite().all())
    off = (left - right).abs()
    bound = (STEP[expected.format] if step is None else step) * right.abs().amax(-1, keepdim=True)
    assert bool((off <= bound).all()), f"off by {float((off / bound.clamp(min=1e-30)).max()):.2f} steps"
    near = off <= 1e-5 * right.abs().amax(-1, keepdim=True)
    assert float(near.float().mean()) >= share, f"{float(near.float().mean()):.4f} of the values agree"
