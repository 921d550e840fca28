"""Reasoning that a client carries: `encrypted_content` of reasoning items, for clients that send nothing else back.

Agents that keep no state on the server return their reasoning items without the text. The field then holds the text in
a form that nobody mistakes for text. It is not a secret: the caller got the same text in the clear.
"""

import base64
import binascii
import zlib

_PREFIX = "tandem1."
MAX_BYTES = 16 * 2**20
"""Reasoning that is longer when unpacked was not sealed here."""


def seal(text: str) -> str:
    return _PREFIX + base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()


def unseal(sealed: object) -> str:
    """The text, or nothing for what was not sealed here."""
    if not isinstance(sealed, str) or not sealed.startswith(_PREFIX):
        return ""
    try:
        packed = base64.urlsafe_b64decode(sealed.removeprefix(_PREFIX))
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(packed, MAX_BYTES)
        return text.decode() if unpacker.eof else ""
    except (binascii.Error, zlib.error, ValueError):
        return ""
