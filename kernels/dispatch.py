"""Which implementation of an op runs: the reference twin or the Triton kernel.

CUDA tensors run Triton. CPU tensors run the twin, except inside `forced_triton()`, with which a test runs a kernel
through Triton's interpreter (the process must have been started with TRITON_INTERPRET=1). Triton is optional on a
machine without a GPU, so nothing here imports it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_forced = False


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the op whose first input is `tensor` runs its Triton kernel."""
    return tensor.is_cuda or _forced


@contextlib.contextmanager
def forced_triton() -> Iterator[None]:
    """Runs Triton kernels on CPU tensors for the duration of the block. Raises RuntimeError without the interpreter."""
    global _forced
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("forced_triton() needs a process started with TRITON_INTERPRET=1")
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
