"""Counters of one agent."""


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
