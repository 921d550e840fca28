"""Small models, raw state pools and batches for the model's tests."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.inventory import inventory
from model.presets import tiny
from model.random_weights import random_weight
from model.state import StateViews
from model.state_layout import StateLayout, build_state_layout
from model.transformer import Transformer


def small_config(**changes: object) -> ModelConfig:
    """The tiny preset with fewer words, for speed; `changes` replace fields."""
    return msgspec.structs.replace(tiny(vocab_size=160), **changes)


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Unquantised values of every weight, by checkpoint name."""
    return {s.name: random_weight(s, config, seed) for s in inventory(config) if not s.name.endswith(".scale")}


def random_model(config: ModelConfig, seed: int = 0, **options: object) -> Transformer:
    model = Transformer(config, **options)
    weights = random_weights(config, seed)
    for name, holder in model.holders().items():
        holder.load(weights[name], None)
    return model


class Pools:
    """Raw pools filled with bytes that no arithmetic survives (0xFF: NaN in every float format)."""

    def __init__(self, layout: StateLayout, num_pages: int = 16, num_slots: int = 4, poison: int = 0xFF) -> None:
        self.layout = layout
        self.pages = torch.full((num_pages, layout.page_bytes), poison, dtype=torch.uint8)
        self.slots = torch.full((num_slots, layout.slot_bytes), poison, dtype=torch.uint8)
        self.views = StateViews(layout, self.pages, self.slots)


def pools(config: ModelConfig, row_format: str = "f32", index_format: str = "f32", **sizes: int) -> Pools:
    page_tokens = sizes.pop("page_tokens", 256)
    layout = build_state_layout(config, row_format=row_format, index_format=index_format, page_tokens=page_tokens)
    return Pools(layout, **sizes)


class Request:
    """One request's place: slot, pages, tokens so far."""

    def __init__(self, slot: int, pages: Sequence[int], length: int = 0) -> None:
        self.slot, self.pages, self.length = slot, list(pages), length


def batch_of(parts: Sequence[tuple[Request, Sequence[int]]], *, all_logits: bool = True) -> ForwardBatch:
    """Packs (request, its next tokens); without `all_logits` only the last row of each request is wanted."""
    lengths = [len(tokens) for _, tokens in parts]
    start = [0]
    for length in lengths:
        start.append(start[-1] + length)
    width = max((len(request.pages) for request, _ in parts), default=0)
    table = [request.pages + [-1] * (width - len(request.pages)) for request, _ in parts]
    rows = range(start[-1]) if all_logits else [end - 1 for end in start[1:]]
    return ForwardBatch(
        token_ids=torch.tensor([t for _, tokens in parts for t in tokens], dtype=torch.int64),
        positions=torch.tensor([r.length + i for r, tokens in parts for i in range(len(tokens))], dtype=torch.int64),
        query_start=torch.tensor(start, dtype=torch.int32),
        context_len=torch.tensor([r.length for r, _ in parts], dtype=torch.int32),
        slot_ids=torch.tensor([r.slot for r, _ in parts], dtype=torch.int32),
        page_table=torch.tensor(table, dtype=torch.int32).view(len(parts), width),
        logits_rows=torch.tensor(list(rows), dtype=torch.int64),
    )


def step(
    model: Transformer, state: StateViews, parts: Sequence[tuple[Request, Sequence[int]]], **options: bool
) -> Tensor:
    """One forward pass; advances the requests. -> logits."""
    logits = model.forward(batch_of(parts, **options), state)
    for request, tokens in parts:
        request.length += len(tokens)
    return logits


def run(
    model: Transformer, state: StateViews, request: Request, tokens: Sequence[int], chunks: Sequence[int]
) -> Tensor:
    """Feeds `tokens` in chunks of the given sizes, the rest one by one. -> logits of every token."""
    logits, at = [], 0
    for size in [*chunks, *([1] * (len(tokens) - sum(chunks)))]:
        logits.append(step(model, state, [(request, tokens[at : at + size])]))
        at += size
    return torch.cat(logits)
