"""What an agent reports to the engine's bridge. Guarantees as in `engine.connector`: each send ends with one SendEnded;
each receive with one Received, or one Quiet (after a ReceiveFailed unless it was cancelled)."""

import msgspec


class SendEnded(msgspec.Struct, frozen=True):
    """The pages and slot of this send are the engine's again."""

    transfer_id: str
    outcome: str
    """"fetched", "released", "expired", "failed"."""


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """Pages and slot hold the state; nothing will write into them any more."""

    transfer_id: str
    payload: bytes
    """As given to `publish_ready`."""
    num_bytes: int
    transfer_s: float
    """From the first read submitted to the last read ended."""
    exposed_s: float
    """From Ready to the last read ended."""
    wait_s: float
    """From the claim to Ready."""


class ReceiveFailed(msgspec.Struct, frozen=True):
    """The state will not arrive. Pages and slot stay with the transfer until Quiet."""

    transfer_id: str
    message: str
    retryable: bool


class Quiet(msgspec.Struct, frozen=True):
    """No read into this transfer's pages and slot is in flight any more."""

    transfer_id: str


class EpochRenewed(msgspec.Struct, frozen=True):
    """The transfer engine was re-created: announce the new epoch."""

    epoch: str


AgentEvent = SendEnded | Received | ReceiveFailed | Quiet | EpochRenewed
