"""From what the scheduler chose to the tensors of one forward pass: decode tokens first, then chunks.

A step without chunks may be padded to the shape of a captured one (see kernels.batch_index for what padding is); any
other has no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.arena import Arena, Field
from engine.request import Request
from engine.rows import Rows
from model.batch import ForwardBatch

_GPU_WIDTHS = 16
"""Widths of page tables on a GPU are multiples of this."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of a prompt."""

    request: Request
    num_tokens: int
    scored: range
    """Positions of the chunk whose next token is a prompt token with log-probabilities wanted."""

    @property
    def completes(self) -> bool:
        """The request's next token can be sampled from it."""
        return self.request.num_computed + self.num_tokens == self.request.num_tokens


class PaddedShape(NamedTuple):
    """What a captured decode step is made for."""

    num_requests: int
    num_pages: int
    """Pages a request may have."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The inputs of one step, on the device. Good until the next one is built."""

    batch: ForwardBatch
    num_decode: int
    source: Tensor | None
    """int64 [num_decode, padding included]: where among the tokens sampled by the step before each decode token is
    found, -1 = it is in the batch. None: all are in the batch."""
    shape: PaddedShape | None
    """Set if the step is padded."""


class BatchBuilder:
    """Builds the inputs of a step in memory that is reused from step to step.

    spare_slot: the slot that padding writes to. On a CPU the tensors are good for one forward pass only."""

    def __init__(
        self, max_tokens: int, max_requests: int, max_pages: int, device: torch.device, *, spare_slot: int
    ) -> None:
        # Kernels are compiled for what the widths of tables are multiples of: one kind serves every step.
        self._width_step = _GPU_WIDTHS if device.type == "cuda" else 1
        widest = -(-max_pages // self._width_step) * self._width_step
        largest = _fields(max_tokens, max_requests, widest, max_tokens + max_requests)
        self._arena = Arena(sum(field.num_bytes for field in largest), device)
        self._spare_slot = spare_slot
        self._counting: NDArray[np.int64] = np.arange(max(max_tokens, max_requests + 1), dtype=np.int64)

    def build(
        self, rows: Rows, num_decode: int, chunks: Sequence[Chunk], shape: PaddedShape | None = None
    ) -> StepBatch:
        """The tokens of rows 0..num_decode-1 and of the chunks, or of those rows padded to `shape`.

        Logits are wanted for the decode tokens, then for the last token of every chunk that completes its prompt, then
        for the scored positions of the chunks.
        """
        logits_rows = self._logits_rows(num_decode, chunks)
        if shape is None:
            num_requests = num_decode + len(chunks)
            num_tokens = num_decode + sum(chunk.num_tokens for chunk in chunks)
            width = int(rows.num_pages[:num_decode].max(initial=1))
            width = max([width, *(len(chunk.request.owned.page_ids) for chunk in chunks)])
            width = -(-width // self._width_step) * self._width_step
        else:
            num_requests = num_tokens = shape.num_requests
            width = shape.num_pages
            logits_rows = self._counting[:num_requests]
        arrays, tensors = self._arena.lay_out(_fields(num_tokens, num_requests, width, len(logits_rows)))
        token_ids, positions, source, wanted, owner, query_start, context_len, slots, table = arrays
        wanted[:] = logits_rows
        token_ids[:num_decode] = rows.token[:num_decode]
        positions[:num_decode] = rows.context_len[:num_decode]
        source[:num_decode] = rows.source[:num_decode]
        context_len[:num_decode] = rows.context_len[:num_decode]
        slots[:num_decode] = rows.slot[:num_decode]
        owner[:num_decode] = self._counting[:num_decode]
        query_start[: num_decode + 1] = self._counting[: num_decode + 1]
        most = min(width, rows.page_table.shape[1])
        table[:num_decode, :most] = rows.page_table[:num_decode, :most]
        table[:num_decode, most:] = 0
        if shape is not None:
            self._pad(arrays, num_decode)
        end = num_decode
        for index, chunk in enumerate(chunks, start=num_decode):
            request, start, first = chunk.request, end, chunk.request.num_computed
            end += chunk.num_tokens
            token_ids[start:end] = request.tokens(first, first + chunk.num_tokens)
            positions[start:end] = self._counting[: chunk.num_tokens] + first
            owner[start:end] = index
            context_len[index] = first
            slots[index] = request.owned.slot_id
            query_start[index + 1] = end
            pages = request.owned.page_ids
            table[index, : len(pages)] = pages
            table[index, len(pages) :] = 0
        self._arena.send()
        feeds = shape is not None or bool((rows.source[:num_decode] >= 0).any())
        return self._step(tensors, num_requests if shape else num_decode, feeds, shape, decode_only=not chunks)

    def padding(self, shape: PaddedShape) -> StepBatch:
        """A step of nothing but padding, in the place where every step of that shape is."""
        arrays, tensors = self._arena.lay_out(_fields(shape.num_requests, *shape, shape.num_requests))
        arrays[3][:] = self._counting[: shape.num_requests]
        self._pad(arrays, 0)
        self._arena.send()
        return self._step(tensors, shape.num_requests, True, shape, decode_only=True)

    def _pad(self, arrays: list[NDArray[np.int64]], num_decode: int) -> None:
        token_ids, positions, source, _, owner, query_start, context_len, slots, table = arrays
        for array in (token_ids, positions, context_len, table):
            array[num_decode:] = 0
        source[num_decode:] = -1
        slots[num_decode:] = self._spare_slot
        owner[num_decode:] = self._counting[num_decode : len(owner)]
        query_start[num_decode:] = self._counting[num_decode : len(query_start)]

    def _logits_rows(self, num_decode: int, chunks: Sequence[Chunk]) -> NDArray[np.int64]:
        if not chunks:
            return self._counting[:num_decode]
        sampled: list[int] = []
        scored: list[int] = []
        end = num_decode
        for chunk in chunks:
            start, end = end, end + chunk.num_tokens
            if chunk.completes:
                sampled.append(end - 1)
            scored.extend(start + position - chunk.request.num_computed for position in chunk.scored)
        return np.concatenate((self._counting[:num_decode], np.asarray(sampled + scored, np.int64)))

    def _step(
        self, tensors: list[Tensor], num_decode: int, feeds: bool, shape: PaddedShape | None, *, decode_only: bool
    ) -> StepBatch:
        token_ids, positions, source, logits_rows, owner, query_start, context_len, slots, table = tensors
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            query_start=query_start,
            context_len=context_len,
            slot_ids=slots,
            page_table=table,
            logits_rows=logits_rows,
            token_request=owner,
            one_token_each=decode_only,
            spare_slot=None if shape is None else self._spare_slot,
        )
        return StepBatch(batch, num_decode, source[:num_decode] if feeds else None, shape)


def _fields(num_tokens: int, num_requests: int, num_pages: int, num_logits: int) -> list[Field]:
    """token ids, positions, source, logits rows; request of each token, query start, context, slots, page table."""
    return [
        Field(torch.int64, (num_tokens,)),
        Field(torch.int64, (num_tokens,)),
        Field(torch.int64, (num_requests,)),
        Field(torch.int64, (num_logits,)),
        Field(torch.int32, (num_tokens,)),
        Field(torch.int32, (num_requests + 1,)),
        Field(torch.int32, (num_requests,)),
        Field(torch.int32, (num_requests,)),
        Field(torch.int32, (num_requests, num_pages)),
    ]
