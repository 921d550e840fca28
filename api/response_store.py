"""Responses kept for a follow-up: bounded in number and in bytes, the oldest forgotten first."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec

Items = list[dict[str, Any]]
"""Input and output items of the Responses API, as JSON objects."""


class StoredResponse(msgspec.Struct, frozen=True):
    """A finished response, and all items that it answered, those of earlier responses first. Both as JSON."""

    response: bytes
    input_items: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.input_items)

    def items(self) -> Items:
        """What the response answered, without the response itself."""
        items: Items = msgspec.json.decode(self.input_items)
        return items

    def conversation(self) -> Items:
        """Everything said so far: what a follow-up goes on from."""
        output: Items = msgspec.json.decode(self.response)["output"]
        return self.items() + output


class ResponseStore:
    """In memory: a restart forgets everything, and each API process has its own."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    @property
    def is_enabled(self) -> bool:
        return self._max_entries > 0

    def put(self, response_id: str, response: dict[str, Any], input_items: Sequence[dict[str, Any]]) -> None:
        """Keep a response, unless it alone is larger than the store."""
        entry = StoredResponse(msgspec.json.encode(response), msgspec.json.encode(input_items))
        self.delete(response_id)
        if entry.num_bytes > self._max_bytes or not self.is_enabled:
            return
        self._entries[response_id] = entry
        self.num_bytes += entry.num_bytes
        while self.num_bytes > self._max_bytes or len(self._entries) > self._max_entries:
            self.delete(next(iter(self._entries)))

    def get(self, response_id: str) -> StoredResponse | None:
        return self._entries.get(response_id)

    def delete(self, response_id: str) -> bool:
        """Whether there was such a response."""
        entry = self._entries.pop(response_id, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
        return entry is not None

    def __len__(self) -> int:
        return len(self._entries)
