"""Registered memory: one region of equal records, addressed by index. Pages are one region, slots another."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec


class MemoryRegion(msgspec.Struct, frozen=True):
    """`count` records of `stride_bytes` each, back to back from `base_address`. The memory belongs to the engine."""

    base_address: int
    stride_bytes: int
    count: int

    def __post_init__(self) -> None:
        if self.base_address <= 0 or self.stride_bytes <= 0 or self.count <= 0:
            raise ValueError(f"not a memory region: {self}")

    @property
    def num_bytes(self) -> int:
        return self.stride_bytes * self.count

    def address(self, index: int, count: int = 1) -> int:
        """Where `count` neighbouring records begin. Raises ValueError, naming the last, if they are not all in here."""
        if not 0 <= index <= self.count - count:
            raise ValueError(f"record {index + count - 1} of a region of {self.count}")
        return self.base_address + index * self.stride_bytes

    def check(self, indices: Sequence[int]) -> None:
        """Raises ValueError, naming one, unless all of them are records of this region."""
        if indices:
            self.address(min(indices))
            self.address(max(indices))


ReadBytes = Callable[[int, int], bytes | memoryview]
"""(address, num_bytes) -> those bytes on the host, as a copy or a view."""


class PoolMemory(Protocol):
    """What kind of memory the regions are in, and how it is dealt with. Calls come from threads of the transfer."""

    def read(self, address: int, num_bytes: int) -> bytes | memoryview:
        """Those bytes on the host, as a copy or a view."""

    def bind_thread(self) -> None:
        """Bind the calling thread to the memory's device. Called before the thread first calls the transfer engine."""

    def settle(self) -> None:
        """Return once all that the transfer engine says it has written can be seen by everybody: a device may still
        have to take in what the host has handed to it."""


class HostMemory:
    """The default: the same on all threads, and written when it is said to be."""

    def read(self, address: int, num_bytes: int) -> memoryview:
        """A view, no copy."""
        return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")

    def bind_thread(self) -> None:
        """Nothing to bind to."""

    def settle(self) -> None:
        """Nothing is on its way."""


HOST_MEMORY = HostMemory()
