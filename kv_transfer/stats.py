"""Counters of one agent."""

import msgspec


class TransferCounters:
    """Written by the transfer thread only. Totals since start."""

    def __init__(self) -> None:
        self.reads_submitted = 0
        self.reads_done = 0
        self.reads_failed = 0
        self.bytes_received = 0
        self.received = 0
        self.receives_failed = 0
        self.sends_ended: dict[str, int] = {"fetched": 0, "released": 0, "expired": 0, "failed": 0}
        self.claims_refused = 0
        self.leases_lapsed = 0
        self.recreations = 0


class AgentStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of one agent. Counts are totals since start unless they say what is there now."""

    reads_submitted: int
    reads_done: int
    reads_failed: int
    bytes_received: int
    received: int
    receives_failed: int
    sends_ended: dict[str, int]
    claims_refused: int
    leases_lapsed: int
    recreations: int
    """How often the transfer engine was re-created."""
    sending: int
    """Transfers opened for sending and not ended, now."""
    receiving: int
    """Receives under way, quarantined ones included, now."""
    reads_in_flight: int
    oldest_read_s: float
    """Age of the oldest unfinished read, now."""
    quarantined_pages: int
    quarantined_s: float
    """Age of the oldest quarantine, now."""
    peers: int
    """Open streams in both directions, now."""
