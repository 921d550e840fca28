"""Where a step's inputs are laid out on the host, and the device memory to which they go as one copy.

Fields start at multiples of 64 bytes and their places follow from dtypes and shapes alone: a captured step finds its
inputs where they were when it was captured. On a GPU the host side is pinned and there are two of it, so that the
inputs of one step can be written while the copy of the step before it is still under way. On a CPU both sides are one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 64
_NUMPY = {torch.int32: np.dtype(np.int32), torch.int64: np.dtype(np.int64)}


class Field(NamedTuple):
    """One array of integers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size: int = math.prod(self.shape) * self.dtype.itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT


class Arena:
    """Owner of the memory. One step is laid out, written, and sent at a time."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._hosts = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device) if on_gpu else self._hosts[0]
        self._turn = 0
        self._used = 0

    def lay_out(self, fields: Sequence[Field]) -> tuple[list[NDArray[np.int64]], list[Tensor]]:
        """Host arrays to be filled, holding whatever they held, and the device tensors that `send` fills from them.

        Arrays of int32 fields are int32; the annotation names the wider of the two."""
        self._turn = (self._turn + 1) % len(self._hosts)
        host = self._hosts[self._turn].numpy()
        arrays: list[NDArray[np.int64]] = []
        tensors: list[Tensor] = []
        start = 0
        for field in fields:
            end = start + math.prod(field.shape) * field.dtype.itemsize
            if end > len(host):
                raise ValueError(f"a step's inputs end at byte {end} of an arena of {len(host)}")
            arrays.append(host[start:end].view(_NUMPY[field.dtype]).reshape(field.shape))
            tensors.append(self._device[start:end].view(field.dtype).view(field.shape))
            start += field.num_bytes
        self._used = min(start, len(host))
        return arrays, tensors

    def send(self) -> None:
        """Start the copy of what was laid out last. The host side may be written again after the next but one step."""
        if self._device is not self._hosts[0]:
            self._device[: self._used].copy_(self._hosts[self._turn][: self._used], non_blocking=True)
