"""What a transfer engine tells everybody who asks at its handshake port: its regions and the protocol it really uses.

A message there is 8 bytes little-endian length, one type byte (counted in the length), and JSON. The listener is a
single thread and waits for silent connections, so ask quickly and hang up. Asking involves no engine of ours and blocks
no longer than the timeout, which Mooncake's own probe does not promise.
"""

import json
import socket
import struct
import time
from typing import Any

_TYPE = 1
_HEADER = struct.Struct("<QB")
_MAX_BYTES = 1 << 20


class DescriptorError(Exception):
    """Nobody there, no answer in time, or not a descriptor."""


def read_descriptor(host: str, port: int, timeout_s: float) -> dict[str, Any]:
    """The descriptor of the engine at `host:port`. Raises DescriptorError."""
    until = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            body = b"{}"
            connection.sendall(_HEADER.pack(len(body) + 1, _TYPE) + body)
            length, _ = _HEADER.unpack(_receive(connection, _HEADER.size, until))
            if not 1 < length <= _MAX_BYTES:
                raise DescriptorError(f"{host}:{port} announced {length} bytes")
            descriptor = json.loads(_receive(connection, length - 1, until))
    except (OSError, ValueError) as error:
        raise DescriptorError(f"{host}:{port}: {error or type(error).__name__}") from None
    if not isinstance(descriptor, dict):
        raise DescriptorError(f"{host}:{port} sent a {type(descriptor).__name__}")
    return descriptor


def _receive(connection: socket.socket, num_bytes: int, until: float) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        chunk = connection.recv(num_bytes - len(received))
        if not chunk:
            raise DescriptorError("the engine closed the connection")
        received += chunk
    return bytes(received)
