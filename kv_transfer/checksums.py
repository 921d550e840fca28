"""Checksums of pages and slots: xxh3-64 over a whole record, whatever part of it is in use.

Prefill's `verify` decides what is summed; decode compares whatever it is told. A sample is every eighth page and the
last one, so that each chunk of a long prompt is likely to contribute.
"""

import asyncio
from collections.abc import Sequence

import xxhash

from kv_transfer.config import Verify
from kv_transfer.messages import Checksums
from kv_transfer.regions import MemoryRegion, ReadBytes

_SAMPLE_EVERY = 8


class StateSums:
    """Sums of one send, taken as its pages become final so that the last chunk does not wait for the first."""

    def __init__(self, verify: Verify, pages: MemoryRegion, slots: MemoryRegion, read_bytes: ReadBytes) -> None:
        self._verify = verify
        self._pages = pages
        self._slots = slots
        self._read_bytes = read_bytes
        self._sums: list[tuple[int, int]] = []
        self._count = 0

    def add_pages(self, indices: Sequence[int], *, last: bool) -> None:
        """The next pages of the transfer; `last`: there will be no more."""
        if self._verify == "off":
            return
        for index in indices:
            position = self._count
            self._count += 1
            if self._verify == "full" or (self._verify == "sample" and position % _SAMPLE_EVERY == _SAMPLE_EVERY - 1):
                self._sums.append((position, _sum(self._pages, index, self._read_bytes)))
        if last and indices and self._verify == "sample" and self._count % _SAMPLE_EVERY:
            self._sums.append((self._count - 1, _sum(self._pages, indices[-1], self._read_bytes)))

    def finish(self, slot: int) -> Checksums:
        if self._verify == "off":
            return Checksums()
        return Checksums(_sum(self._slots, slot, self._read_bytes), tuple(self._sums))


def _sum(region: MemoryRegion, index: int, read_bytes: ReadBytes) -> int:
    return xxhash.xxh3_64_intdigest(read_bytes(region.address(index), region.stride_bytes))


async def first_mismatch(
    told: Checksums,
    pages: MemoryRegion,
    page_indices: Sequence[int],
    slots: MemoryRegion,
    slot: int,
    read_bytes: ReadBytes,
) -> str | None:
    """None if our copy has the sums we were told, else what differs. Yields to the loop after each record."""
    for position, expected in told.pages:
        if not 0 <= position < len(page_indices):
            return f"checksum for page {position} of {len(page_indices)}"
        found = _sum(pages, page_indices[position], read_bytes)
        if found != expected:
            return f"page {position} of {len(page_indices)} has checksum {found:016x}, prefill sent {expected:016x}"
        await asyncio.sleep(0)
    if told.slot is not None:
        found = _sum(slots, slot, read_bytes)
        if found != told.slot:
            return f"the slot has checksum {found:016x}, prefill sent {told.slot:016x}"
    return None
