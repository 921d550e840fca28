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
        num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        on_gpu = device.type == "cuda"
        self._hosts = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device) if on_gpu else self._hosts[0]
        # Views of all of it by dtype: cutting a piece from one costs half of making a view of bytes.
        self._arrays = [{dtype: host.numpy().view(_NUMPY[dtype]) for dtype in _NUMPY} for host in self._hosts]
        self._tensors = {dtype: self._device.view(dtype) for dtype in _NUMPY}
        self._num_bytes = num_bytes
        self._turn = 0
        self._used = 0

    def lay_out(self, fields: Sequence[Field]) -> tuple[list[NDArray[np.int64]], list[Tensor]]:
        """Host arrays to be filled, holding whatever they held, and the device tensors that `send` fills from them.

        Arrays of int32 fields are int32; the annotation names the wider of the two."""
        self._turn = (self._turn + 1) % len(self._hosts)
        host = self._arrays[self._turn]
        arrays: list[NDArray[np.int64]] = []
        tensors: list[Tensor] = []
        start = end = 0
        for dtype, shape in fields:
            size = dtype.itemsize
            first = start // size
            last = first + math.prod(shape)
            end = last * size
            if end > self._num_bytes:
                raise ValueError(f"a step's inputs end at byte {end} of an arena of {self._num_bytes}")
            array, tensor = host[dtype][first:last], self._tensors[dtype][first:last]
            arrays.append(array if len(shape) == 1 else array.reshape(shape))
            tensors.append(tensor if len(shape) == 1 else tensor.view(shape))
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._used = end
        return arrays, tensors

    def send(self) -> None:
        """Start the copy of what was laid out last. The host side may be written again after the next but one step."""
        if self._device is not self._hosts[0]:
            self._device[: self._used].copy_(self._hosts[self._turn][: self._used], non_blocking=True)
