"""Decode steps that are captured once and replayed: one per number of requests and of pages in use.

A captured step reads its inputs from the arena, where they lie at the same addresses whenever a step has its shape.
Fewer requests than it was captured for are padded. All captures share one memory pool, which is as large as the largest
of them, because one runs at a time; what a replay returns is therefore good until the next replay.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import BatchBuilder, PaddedShape, StepBatch

log = logging.getLogger(__name__)

Run = Callable[[], Tensor]

_WIDTH_STEP = 4
"""Between the page counts that steps are captured for. Kernels are launched for as many pages as there may be, so a
step captured for a million tokens would be slow for a thousand."""
_FEWEST_PAGES = 64


class Capture(Protocol):
    """How a step is captured."""

    def __call__(self, run: Run) -> Run:
        """-> replays `run`, into the same output."""


class CudaCapture:
    """CUDA graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Run) -> Run:
        # Compiles kernels and fills caches, which must not happen while capturing.
        run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def no_capture(run: Run) -> Run:
    """On a CPU a captured step is the step itself, on its padded inputs."""
    return run


def auto_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of requests to capture for: few rows are wasted, and few graphs made."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, max_num_seqs + 1, 64)]
    return tuple(sorted({size for size in steps if size < max_num_seqs} | {max_num_seqs}))


def auto_widths(max_pages: int) -> tuple[int, ...]:
    """Numbers of pages a request to capture for; the last is the most there can be."""
    widths: list[int] = []
    width = _FEWEST_PAGES
    while width < max_pages:
        widths.append(width)
        width *= _WIDTH_STEP
    return (*widths, max_pages)


class DecodeGraphs:
    """The captured steps of one rank."""

    def __init__(self, sizes: Sequence[int], widths: Sequence[int], capture: Capture) -> None:
        self._sizes = sorted(sizes)
        self._widths = sorted(widths)
        self._capture = capture
        self._replays: dict[PaddedShape, Run] = {}

    def capture(self, builder: BatchBuilder, step: Callable[[StepBatch], Tensor]) -> None:
        """Capture `step`, which computes a padded batch, for every shape; the largest first, so that the pool is never
        extended."""
        started = time.monotonic()
        for width in reversed(self._widths):
            for size in reversed(self._sizes):
                shape = PaddedShape(size, width)
                self._replays[shape] = self._capture_one(builder.padding(shape), step)
        log.info(
            "%d decode steps captured in %.1f s: up to %d requests of %d pages",
            len(self._replays), time.monotonic() - started, self._sizes[-1], self._widths[-1],
        )  # fmt: skip

    def _capture_one(self, batch: StepBatch, step: Callable[[StepBatch], Tensor]) -> Run:
        def run() -> Tensor:
            with torch.inference_mode():
                return step(batch)

        return self._capture(run)

    def close(self) -> None:
        """Give the captured steps up. A communicator whose collectives they hold cannot end before they have."""
        self._replays.clear()

    def shape_for(self, num_requests: int, num_pages: int) -> PaddedShape | None:
        """The smallest captured step that holds such a batch."""
        size = next((size for size in self._sizes if size >= num_requests), None)
        width = next((width for width in self._widths if width >= num_pages), None)
        return None if size is None or width is None else PaddedShape(size, width)

    def replay(self, shape: PaddedShape) -> Tensor:
        """The inputs of the step were built for `shape`. -> what the model returned, padding included."""
        return self._replays[shape]()
