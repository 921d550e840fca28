"""What the engine knows about moving state between ranks: one protocol and the events it answers with.

The engine speaks in pages and slots it owns; the node's bridge turns them into addresses for `kv_transfer`. All calls
come from the step thread and must not block or do I/O; what happened meanwhile is collected with `poll()` once a step.

Ownership. On the sending side a request's pages and slot stay owned by the engine (held) until `SendEnded`. On the
receiving side they belong to the transfer from `receive()` until exactly one of `Received`, or `Quiet` after a
`ReceiveFailed`: only then may they be reused, because only then is no read into them in flight.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from runtime.requests import TokenLogprobs


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """What prefill hands over besides bytes: the first sampled token and what sampling it left behind."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    seed: int
    """The seed the first token was drawn with, so that a caller without one still gets one consistent stream."""
    prompt_tokens: int
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class SendEnded(msgspec.Struct, frozen=True, tag=True):
    """The state held for this transfer is no longer needed: fetched, released, or its lease ran out."""

    transfer_id: str
    outcome: str
    """"fetched", "released", "expired", "failed"."""


class Received(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Pages and slot hold the prompt's state; nothing will write into them any more."""

    transfer_id: str
    first: FirstToken
    num_bytes: int
    transfer_s: float
    exposed_s: float
    wait_s: float


class ReceiveFailed(msgspec.Struct, frozen=True, tag=True):
    """The state will not arrive. The pages and slot given to `receive()` are quarantined until `Quiet`."""

    transfer_id: str
    message: str
    retryable: bool
    """True if computing again may help (peer lost or restarted, lease over); False for a refusal (format)."""


class Quiet(msgspec.Struct, frozen=True, tag=True):
    """No read into this transfer's pages is in flight any more: they may be reused."""

    transfer_id: str


class EpochRenewed(msgspec.Struct, frozen=True, tag=True):
    """The transfer engine was re-created; the process must announce the new epoch."""

    epoch: str


ConnectorEvent = SendEnded | Received | ReceiveFailed | Quiet | EpochRenewed


class Connector(Protocol):
    """How the step loop talks to the transfer. Implemented by `node.bridge`; `NoConnector` is for a rank alone."""

    def open_send(self, transfer_id: str, prompt_ids: Sequence[int]) -> None:
        """A prefill for this transfer was admitted; claims for it may be answered from now on."""

    def pages_final(self, transfer_id: str, page_ids: Sequence[int]) -> None:
        """These further pages, in prompt order, are full and will not change any more."""

    def send_ready(self, transfer_id: str, page_ids: Sequence[int], slot_id: int, first: FirstToken) -> None:
        """The prompt is done: the remaining pages (the last may be partial), the slot and the first token."""

    def cancel_send(self, transfer_id: str, reason: str) -> None:
        """The prefill was aborted or failed before `send_ready`. Answered by `SendEnded`."""

    def receive(
        self,
        transfer_id: str,
        source_address: str,
        source_epoch: str,
        prompt_ids: Sequence[int],
        page_ids: Sequence[int],
        slot_id: int,
    ) -> None:
        """Fetch a prompt's state into these pages (ceil(len(prompt_ids) / page_tokens) of them) and this slot."""

    def cancel_receive(self, transfer_id: str) -> None:
        """The request is gone. Answered by `Quiet`, or by a `Received` already under way, which then means the same."""

    def release(self, transfer_id: str) -> None:
        """The router gave the transfer up: let go of it on whichever side it is, now or when it turns up."""

    def poll(self) -> Sequence[ConnectorEvent]:
        """Events since the last call, in order. Never blocks."""
        ...


class NoConnector:
    """A rank that takes part in no transfers."""

    def poll(self) -> Sequence[ConnectorEvent]:
        return ()

    def release(self, transfer_id: str) -> None:
        """Nothing can be held here."""
