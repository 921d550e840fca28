"""Between an engine and the transfer: page and slot numbers on one side, payload bytes and prompt hashes on the other.

The engine and `kv_transfer` do not know each other. This adapter implements `engine.connector.Connector` on top of
`kv_transfer.agent.TransferAgent`; everything happens on the step thread and nothing blocks.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash

from engine import connector
from engine.connector import ConnectorEvent, FirstToken
from kv_transfer import agent_events as transfer
from kv_transfer.agent import TransferAgent

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FirstToken).decode


def prompt_hash(prompt_ids: Sequence[int]) -> bytes:
    """128 bits over the token ids: both sides must mean the same prompt, whoever encoded it."""
    return xxhash.xxh3_128_digest(np.asarray(prompt_ids, dtype="<i8").tobytes())


class Bridge:
    """A `Connector` for one rank."""

    def __init__(self, transfer: TransferAgent) -> None:
        self._transfer = transfer

    def open_send(self, transfer_id: str, prompt_ids: Sequence[int]) -> None:
        self._transfer.open_send(transfer_id, len(prompt_ids), prompt_hash(prompt_ids))

    def pages_final(self, transfer_id: str, page_ids: Sequence[int]) -> None:
        self._transfer.publish_pages(transfer_id, page_ids)

    def send_ready(self, transfer_id: str, page_ids: Sequence[int], slot_id: int, first: FirstToken) -> None:
        self._transfer.publish_ready(transfer_id, page_ids, slot_id, _encode(first))

    def cancel_send(self, transfer_id: str, reason: str) -> None:
        self._transfer.cancel_send(transfer_id, reason)

    def receive(
        self,
        transfer_id: str,
        source_address: str,
        source_epoch: str,
        prompt_ids: Sequence[int],
        page_ids: Sequence[int],
        slot_id: int,
    ) -> None:
        self._transfer.open_receive(
            transfer_id, source_address, source_epoch, len(prompt_ids), prompt_hash(prompt_ids), page_ids, slot_id
        )

    def cancel_receive(self, transfer_id: str) -> None:
        self._transfer.cancel_receive(transfer_id)

    def release(self, transfer_id: str) -> None:
        self._transfer.release(transfer_id)

    def poll(self) -> Sequence[ConnectorEvent]:
        return [_translate(event) for event in self._transfer.poll()]


def _translate(event: transfer.AgentEvent) -> ConnectorEvent:
    match event:
        case transfer.SendEnded(transfer_id, outcome):
            return connector.SendEnded(transfer_id, outcome)
        case transfer.Received():
            return connector.Received(
                transfer_id=event.transfer_id,
                first=_decode(event.payload),
                num_bytes=event.num_bytes,
                transfer_s=event.transfer_s,
                exposed_s=event.exposed_s,
                wait_s=event.wait_s,
            )
        case transfer.ReceiveFailed(transfer_id, message, retryable):
            return connector.ReceiveFailed(transfer_id, message, retryable)
        case transfer.Quiet(transfer_id):
            return connector.Quiet(transfer_id)
        case transfer.EpochRenewed(epoch):
            return connector.EpochRenewed(epoch)
