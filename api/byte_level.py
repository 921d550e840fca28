"""Byte-level BPE spells each byte as one printable character; this maps a vocabulary back to bytes."""

from collections.abc import Iterable
from typing import Final


def _alphabet() -> dict[str, int]:
    """Character -> byte. Printable Latin-1 stands for itself, every other byte for the next free code point."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET: Final = _alphabet()
_TO_LATIN_1: Final = str.maketrans({char: chr(byte) for char, byte in ALPHABET.items()})


def token_bytes(token: str) -> bytes:
    """The bytes a vocabulary entry stands for; an entry that is not spelled in the alphabet is plain text."""
    if ALPHABET.keys() >= set(token):
        return token.translate(_TO_LATIN_1).encode("latin-1")
    return token.encode()


def bytes_table(vocabulary: Iterable[tuple[str, int]]) -> list[bytes]:
    """id -> bytes for all ids up to the largest; ids without an entry are empty."""
    entries = list(vocabulary)
    table = [b""] * (1 + max((token_id for _, token_id in entries), default=-1))
    for token, token_id in entries:
        table[token_id] = token_bytes(token)
    return table
