"""How a list of records becomes reads: few and large, but enough of them that all connections work in parallel."""

from collections.abc import Iterable, Sequence

import msgspec

from kv_transfer.regions import MemoryRegion


class Piece(msgspec.Struct, frozen=True):
    """One contiguous read. Addresses are absolute, sizes bytes."""

    local: int
    remote: int
    num_bytes: int


def plan_records(
    local: MemoryRegion, local_indices: Sequence[int], remote: MemoryRegion, remote_indices: Sequence[int]
) -> Iterable[Piece]:
    """One piece per record, in order. Raises ValueError for an index outside its region."""
    for mine, theirs in zip(local_indices, remote_indices, strict=True):
        yield Piece(local.address(mine), remote.address(theirs), remote.stride_bytes)


def merge_and_split(pieces: Iterable[Piece], max_bytes: int) -> list[Piece]:
    """Join neighbours that touch on both sides, then cut what is larger than `max_bytes` into nearly equal parts.

    Parts are multiples of 4 KiB but for the last.
    """
    runs: list[Piece] = []
    for piece in pieces:
        last = runs[-1] if runs else None
        if last and last.local + last.num_bytes == piece.local and last.remote + last.num_bytes == piece.remote:
            runs[-1] = Piece(last.local, last.remote, last.num_bytes + piece.num_bytes)
        else:
            runs.append(piece)
    return [part for run in runs for part in _split(run, max_bytes)]


def _split(run: Piece, max_bytes: int) -> Iterable[Piece]:
    count = -(-run.num_bytes // max_bytes)
    size = -(-run.num_bytes // count // 4096) * 4096
    for offset in range(0, run.num_bytes, size):
        yield Piece(run.local + offset, run.remote + offset, min(size, run.num_bytes - offset))
