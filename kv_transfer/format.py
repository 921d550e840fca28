"""What the bytes of a state mean, in a form two ranks can compare before any of them moves."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import msgspec


class StateFormat(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Everything that must be equal on both sides for a copied page or slot to make sense.

    `layout` is the model's state layout as builtins (regions, byte offsets, row formats). The digest covers it all.
    """

    model_fingerprint: str
    """Identifies the weights' shape: two checkpoints with equal fingerprints produce interchangeable state."""
    layout: Mapping[str, Any]
    page_bytes: int
    slot_bytes: int
    page_tokens: int

    def __post_init__(self) -> None:
        for name in ("page_bytes", "slot_bytes", "page_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys), 64 hex digits."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    @cached_property
    def summary(self) -> str:
        """One line for people; names every scalar, so that a mismatch message shows what differs."""
        return (
            f"model {self.model_fingerprint}, {self.page_tokens} tokens/page, {self.page_bytes} B/page, "
            f"{self.slot_bytes} B/slot, digest {self.digest[:12]}"
        )

    def num_pages(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens occupy, the last one possibly in part."""
        return -(-num_tokens // self.page_tokens)

    def mismatch(self, other: "StateFormat") -> str | None:
        """None when the formats are equal, else one line that names both values of the first difference."""
        for name in ("model_fingerprint", "page_tokens", "page_bytes", "slot_bytes", "layout"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                if isinstance(mine, Mapping):
                    name, mine, theirs = _first_difference(name, mine, theirs)
                return f"state formats differ in {name}: {mine!r} here, {theirs!r} there"
        return None


def _first_difference(path: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Descend into nested mappings and sequences to the first leaf that differs."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in sorted(mine.keys() | theirs.keys(), key=str):
            if mine.get(key) != theirs.get(key):
                return _first_difference(f"{path}.{key}", mine.get(key), theirs.get(key))
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple) and len(mine) == len(theirs):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                return _first_difference(f"{path}[{i}]", a, b)
    return path, mine, theirs
