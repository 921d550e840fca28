"""What decode and prefill ranks say to each other about one hand-off, as typed frozen messages.

`wire.py` turns them into protobuf and back; nothing else knows the wire. (transfer_id, attempt) names one claim of one
decode rank; `ask` numbers that claim's messages, so that a lease can be counted from before the question was sent.
"""

import msgspec

from kv_transfer.regions import MemoryRegion


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Both directions, first on a stream: who speaks, and what its bytes mean."""

    epoch: str
    session_id: str
    transport: str
    engine_version: str
    format_digest: str
    format_summary: str
    pages: MemoryRegion
    slots: MemoryRegion
    lease_s: float
    """The leases this rank grants."""
    lane_port: int = 0
    """Prefill's: where the conversation goes on (`lane`),"""
    lane_key: bytes = b""
    """and how it begins there."""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """decode -> prefill: I have room and want this state."""

    transfer_id: str
    attempt: int
    ask: int
    source_epoch: str
    num_tokens: int
    prompt_hash: bytes


class Renew(msgspec.Struct, frozen=True, kw_only=True):
    """decode -> prefill: I am still at it."""

    transfer_id: str
    attempt: int
    ask: int


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """decode -> prefill: every byte arrived inside the lease."""

    transfer_id: str
    attempt: int


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """decode -> prefill: I shall never use it, whatever still arrives."""

    transfer_id: str
    attempt: int
    reason: str


class Lease(msgspec.Struct, frozen=True):
    """Announced records stay until `seconds` after prefill received message number `ask` of this claim."""

    ask: int
    seconds: float


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """prefill -> decode: further final pages (maybe none), as indices into the prefill rank's pages."""

    transfer_id: str
    attempt: int
    lease: Lease
    first_page: int
    """Position of `pages[0]` in the transfer's list of pages: repeated news is recognised as such."""
    pages: tuple[int, ...]


class Checksums(msgspec.Struct, frozen=True):
    """xxh3-64 of the slot (None: not taken) and of some pages, by position in the transfer's list of pages."""

    slot: int | None = None
    pages: tuple[tuple[int, int], ...] = ()


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """prefill -> decode: the prompt is done; the remaining pages, the slot, and what the first token needs."""

    transfer_id: str
    attempt: int
    lease: Lease
    first_page: int
    pages: tuple[int, ...]
    slot: int
    payload: bytes
    prompt_hash: bytes
    checksums: Checksums


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """prefill -> decode: this claim is over. `retryable`: computing the prompt again may help."""

    transfer_id: str
    attempt: int
    reason: str
    retryable: bool


ToPrefill = Hello | Claim | Renew | Fetched | Release
ToDecode = Hello | Progress | Ready | Refuse
