"""Who owns what: every transfer id from its creation to its end, which is exactly one of finished and released.

A transfer is *finished* when the decode node answered with a token: the state has arrived and prefill has let go. On
every other path it is *released*: both nodes are told that nobody will ask for it any more. There is no third way out,
and `check_integrity` says so.
"""

import itertools
import logging
import secrets
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from router.registry import Node, Release, Target

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Transfer:
    """One hand-off that a request asked for. With several choices, choice k is `{transfer_id}-{k}` on the wire."""

    transfer_id: str
    owner: int
    """The number of the request it serves; request ids are the clients' and may repeat."""
    request_id: str
    prefill: Target
    source_address: str
    source_epoch: str
    choices: int
    opened_at: float
    decodes: list[Target] = field(default_factory=list)
    """Every decode rank that was told about it, the current one last."""
    computed: bool = False
    """Prefill has answered: the state is there."""
    end: str | None = None
    """How it ended: "finished", or why it was released."""

    @property
    def wire_ids(self) -> list[str]:
        if self.choices == 1:
            return [self.transfer_id]
        return [f"{self.transfer_id}-{choice}" for choice in range(self.choices)]


class TransferTable:
    """Owner of all transfers this router made."""

    def __init__(self, clock: Callable[[], float], tell: Callable[[Node, Release], None]) -> None:
        """`tell` lets a node know that a transfer was given up; it must not block."""
        self._clock = clock
        self._tell = tell
        # 128 bits: 80 at random say which router made it, and when it started; the rest counts.
        self._prefix = secrets.token_hex(10)
        self._numbers = itertools.count(1)
        self._open: dict[str, Transfer] = {}
        self.opened = 0
        self.finished = 0
        self.released = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, owner: int, request_id: str, prefill: Target, choices: int) -> Transfer:
        transfer = Transfer(
            transfer_id=f"{self._prefix}{next(self._numbers):012x}",
            owner=owner,
            request_id=request_id,
            prefill=prefill,
            source_address=prefill.info.handoff_address,
            source_epoch=prefill.info.epoch,
            # vLLM gives every choice of a request the same id.
            choices=choices if prefill.node.info.dialect == "tandem" else 1,
            opened_at=self._clock(),
        )
        self._open[transfer.transfer_id] = transfer
        self.opened += 1
        return transfer

    def finish(self, transfer: Transfer) -> None:
        """The state arrived."""
        self._end(transfer, "finished")
        self.finished += 1

    def release(self, transfer: Transfer, reason: str) -> None:
        """Give the transfer up and tell every node that knows of it."""
        self._end(transfer, reason)
        self.released += 1
        targets = {target.node.info.node_id: target for target in (*transfer.decodes, transfer.prefill)}
        for target in targets.values():
            for wire_id in transfer.wire_ids:
                self._tell(target.node, Release(wire_id, target.info, transfer.computed))
        log.debug("transfer %s of %s released: %s", transfer.transfer_id, transfer.request_id, reason)

    def oldest_s(self) -> float:
        """Age of the oldest open transfer."""
        first = next(iter(self._open.values()), None)
        return 0.0 if first is None else self._clock() - first.opened_at

    def stranded(self, live: Set[int]) -> list[Transfer]:
        """Open transfers whose request is not among the `live` ones. Always empty, or there is a bug."""
        return [transfer for transfer in self._open.values() if transfer.owner not in live]

    def check_integrity(self, live: Set[int]) -> None:
        """Raises AssertionError, naming names, unless every open transfer has a live request and the counts add up."""
        stranded = [f"{t.transfer_id} of {t.request_id}" for t in self.stranded(live)]
        assert not stranded, f"transfers without a request: {stranded}"
        assert self.opened == self.finished + self.released + len(self._open), (
            f"{self.opened} transfers opened, {self.finished} finished, {self.released} released, "
            f"{len(self._open)} still open"
        )
        assert all(transfer.end is None for transfer in self._open.values()), "an ended transfer is still in the table"

    def _end(self, transfer: Transfer, end: str) -> None:
        assert transfer.end is None, f"transfer {transfer.transfer_id} ended as {transfer.end!r}, now again as {end!r}"
        transfer.end = end
        del self._open[transfer.transfer_id]
