"""Parts of a sublayer that do not need each other, side by side on a GPU's two streams.

Decode steps are made of kernels that leave most of a GPU idle: what a sublayer computes for its shared expert or its
indexer need not wait for what it computes for routing or queries. `fork()` marks a place, launches inside
`with branch:` run from there on the second stream, and what comes behind `join()` waits for them. So tensors cross in
one direction at `fork()` and in the other at `join()`, and memory that either stream frees is used again by itself
only. No result depends on it.
"""

from __future__ import annotations

from types import TracebackType

import torch


class Branch:
    """The second way through the sublayers of a step; without a stream everything runs in turn."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        self._fork: torch.cuda.Event | None = None
        self._inside: torch.cuda.StreamContext | None = None

    def fork(self) -> None:
        """Blocks that follow need nothing that is launched after this."""
        if self._stream is not None:
            self._fork = torch.cuda.current_stream(self._stream.device).record_event()

    def __enter__(self) -> None:
        if self._stream is None:
            return
        assert self._fork is not None, "fork() comes first"
        self._stream.wait_event(self._fork)
        self._inside = torch.cuda.stream(self._stream)
        self._inside.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._inside is not None:
            self._inside.__exit__(kind, error, trace)
            self._inside = None

    def join(self) -> None:
        """What follows comes behind the blocks since the last join."""
        if self._stream is not None and self._fork is not None:
            self._fork = None
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


IN_TURN = Branch()
"""For devices and batches that gain nothing."""
