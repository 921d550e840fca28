"""Registered memory: one region of equal records, addressed by index. Pages are one region, slots another."""

import ctypes
from collections.abc import Callable

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

    def address(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise ValueError(f"record {index} of a region of {self.count}")
        return self.base_address + index * self.stride_bytes


ReadBytes = Callable[[int, int], bytes | memoryview]
"""(address, num_bytes) -> those bytes on the host, as a copy or a view. Lets checksums reach device memory."""


BindThread = Callable[[], None]
"""Called on every thread of ours before it first calls the transfer engine: binds it to the device of the pools."""


def bind_no_device() -> None:
    """The default `BindThread`: host memory is the same on all threads."""


def read_host_bytes(address: int, num_bytes: int) -> memoryview:
    """The default `ReadBytes`: a view of host memory, no copy."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
