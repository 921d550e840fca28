"""A step between its launch and its collection: what must be remembered because rows may move meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.batch import Chunk
from engine.request import Request
from engine.rows import Rows
from engine.runner import LaunchedStep


@dataclass(frozen=True, slots=True)
class LaunchedChunk:
    """Part of a prompt that the step computes."""

    request: Request
    scored: range
    num_tokens: int
    num_written: int
    """Tokens of the request that are in the state afterwards."""
    completes: bool

    @classmethod
    def of(cls, chunk: Chunk) -> "LaunchedChunk":
        """Of a chunk that is not counted as computed yet."""
        end = chunk.request.num_computed + chunk.num_tokens
        return cls(chunk.request, chunk.scored, chunk.num_tokens, end, chunk.completes)


@dataclass(frozen=True, slots=True)
class Flight:
    """B requests get a token from this step, in the order of its logits: decoding ones, then completed prompts."""

    requests: Sequence[Request]
    num_decode: int
    chunks: Sequence[LaunchedChunk]
    launched: LaunchedStep
    last: NDArray[np.bool_]
    """[B]: the token is the last one whatever it is. The same rows of `Rows` below, as they were."""
    ignore_eos: NDArray[np.bool_]
    has_stop_ids: NDArray[np.bool_]
    has_grammar: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Rows, num_decode: int, chunks: Sequence[LaunchedChunk], launched: LaunchedStep) -> "Flight":
        """Of a step with all rows. `rows.num_generated` counts its tokens already."""
        count = len(rows)
        return cls(
            requests=tuple(rows.requests),
            num_decode=num_decode,
            chunks=chunks,
            launched=launched,
            last=rows.num_generated[:count] >= rows.max_generated[:count],
            ignore_eos=rows.ignore_eos[:count].copy(),
            has_stop_ids=rows.has_stop_ids[:count].copy(),
            has_grammar=rows.has_grammar[:count].copy(),
        )
