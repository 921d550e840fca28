"""How a list of records becomes reads: few and large, but enough of them that all connections work in parallel."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from kv_transfer.regions import MemoryRegion


class Piece(msgspec.Struct, frozen=True):
    """One contiguous stretch of memory to read. Addresses are absolute, sizes bytes."""

    local: int
    remote: int
    num_bytes: int


def plan_records(
    local: MemoryRegion, local_indices: Sequence[int], remote: MemoryRegion, remote_indices: Sequence[int]
) -> list[Piece]:
    """One piece for each run of records that are neighbours on both sides, in order.

    Raises ValueError for an index outside its region.
    """
    runs = []
    mine = theirs = count = 0
    for next_mine, next_theirs in zip(local_indices, remote_indices, strict=True):
        if count and next_mine == mine + count and next_theirs == theirs + count:
            count += 1
            continue
        if count:
            runs.append(_run(local, mine, remote, theirs, count))
        mine, theirs, count = next_mine, next_theirs, 1
    if count:
        runs.append(_run(local, mine, remote, theirs, count))
    return runs


def _run(local: MemoryRegion, mine: int, remote: MemoryRegion, theirs: int, count: int) -> Piece:
    return Piece(local.address(mine, count), remote.address(theirs, count), count * remote.stride_bytes)


def split(pieces: Iterable[Piece], max_bytes: int) -> Iterator[Piece]:
    """Each piece in nearly equal parts of at most `max_bytes`: multiples of 4 KiB but for the last."""
    for piece in pieces:
        count = -(-piece.num_bytes // max_bytes)
        size = -(-piece.num_bytes // count // 4096) * 4096
        for offset in range(0, piece.num_bytes, size):
            yield Piece(piece.local + offset, piece.remote + offset, min(size, piece.num_bytes - offset))
