"""From what the scheduler chose to the tensors of one forward pass. No padding; decode tokens first, then chunks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import Request
from engine.rows import Rows
from model.batch import ForwardBatch


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


class BatchBuilder:
    """Builds a `ForwardBatch` in host arrays that are reused from step to step.

    On a CPU the tensors alias those arrays and `Rows`: they are good for one forward pass, before either changes.
    """

    def __init__(self, max_tokens: int, max_requests: int, device: torch.device) -> None:
        self._device = device
        self._token_ids: NDArray[np.int64] = np.zeros(max_tokens, np.int64)
        self._positions: NDArray[np.int64] = np.zeros(max_tokens, np.int64)
        self._query_start: NDArray[np.int32] = np.zeros(max_requests + 1, np.int32)
        self._context_len: NDArray[np.int32] = np.zeros(max_requests, np.int32)
        self._slots: NDArray[np.int32] = np.zeros(max_requests, np.int32)
        self._counting: NDArray[np.int64] = np.arange(max(max_tokens, max_requests + 1), dtype=np.int64)

    def build(self, rows: Rows, num_decode: int, chunks: Sequence[Chunk]) -> ForwardBatch:
        """The tokens of rows 0..num_decode-1 and of the chunks.

        Logits are wanted for the decode tokens, then for the last token of every chunk that completes its prompt, then
        for the scored positions of the chunks.
        """
        num_tokens = num_decode + sum(chunk.num_tokens for chunk in chunks)
        num_requests = num_decode + len(chunks)
        self._token_ids[:num_decode] = rows.token[:num_decode]
        self._positions[:num_decode] = rows.context_len[:num_decode]
        self._context_len[:num_decode] = rows.context_len[:num_decode]
        self._slots[:num_decode] = rows.slot[:num_decode]
        self._query_start[: num_decode + 1] = self._counting[: num_decode + 1]
        sampled: list[int] = []
        scored: list[int] = []
        end = num_decode
        for index, chunk in enumerate(chunks, start=num_decode):
            request, start, first = chunk.request, end, chunk.request.num_computed
            end += chunk.num_tokens
            self._token_ids[start:end] = request.tokens(first, first + chunk.num_tokens)
            self._positions[start:end] = self._counting[: chunk.num_tokens] + first
            self._context_len[index] = first
            self._slots[index] = request.owned.slot_id
            self._query_start[index + 1] = end
            if chunk.completes:
                sampled.append(end - 1)
            scored.extend(start + position - first for position in chunk.scored)
        if chunks:
            logits_rows = np.concatenate((self._counting[:num_decode], np.asarray(sampled + scored, np.int64)))
        else:
            logits_rows = self._counting[:num_decode]
        return ForwardBatch(
            token_ids=self._tensor(self._token_ids[:num_tokens]),
            positions=self._tensor(self._positions[:num_tokens]),
            query_start=self._tensor(self._query_start[: num_requests + 1]),
            context_len=self._tensor(self._context_len[:num_requests]),
            slot_ids=self._tensor(self._slots[:num_requests]),
            page_table=self._page_table(rows, num_decode, chunks),
            logits_rows=self._tensor(logits_rows),
        )

    def _page_table(self, rows: Rows, num_decode: int, chunks: Sequence[Chunk]) -> Tensor:
        width = int(rows.num_pages[:num_decode].max(initial=1))
        width = max([width, *(len(chunk.request.owned.page_ids) for chunk in chunks)])
        if not chunks:
            return self._tensor(np.ascontiguousarray(rows.page_table[:num_decode, :width]))
        table = np.zeros((num_decode + len(chunks), width), np.int32)
        table[:num_decode] = rows.page_table[:num_decode, :width]
        for index, chunk in enumerate(chunks, start=num_decode):
            pages = chunk.request.owned.page_ids
            table[index, : len(pages)] = pages
        return self._tensor(table)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
