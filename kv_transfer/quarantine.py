"""Pages and slots of receives that are over while reads into them are still in flight.

A deadline is not a cancellation: the transfer engine may still write. Records enter when their receive failed or was
cancelled and leave when the last read is terminal, or when the engine was destroyed, which ends every read.
"""

from collections.abc import Callable, Sequence

import msgspec


class Held(msgspec.Struct, frozen=True):
    pages: tuple[int, ...]
    slot: int
    since: float


class Quarantine:
    """The one owner of quarantined records. `clock` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: dict[str, Held] = {}

    def enter(self, transfer_id: str, pages: Sequence[int], slot: int) -> None:
        if transfer_id in self._held:
            raise AssertionError(f"{transfer_id} is already in quarantine")
        self._held[transfer_id] = Held(tuple(pages), slot, self._clock())

    def leave(self, transfer_id: str) -> float:
        """How long the records were held, in seconds."""
        return self._clock() - self._held.pop(transfer_id).since

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._held

    @property
    def num_pages(self) -> int:
        return sum(len(held.pages) for held in self._held.values())

    @property
    def oldest_s(self) -> float:
        """Age of the oldest entry, 0 when empty."""
        return max((self._clock() - held.since for held in self._held.values()), default=0.0)

    def check_integrity(self) -> None:
        """Raises AssertionError naming records that two transfers hold."""
        pages: dict[int, str] = {}
        slots: dict[int, str] = {}
        for transfer_id, held in self._held.items():
            for owners, indices in ((pages, held.pages), (slots, (held.slot,))):
                for index in indices:
                    other = owners.setdefault(index, transfer_id)
                    assert other == transfer_id, f"record {index} is quarantined for {other} and {transfer_id}"
