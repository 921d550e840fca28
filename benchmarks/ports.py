"""Ports for programs that a benchmark or a test starts."""

import contextlib
import random
import socket


def free_port() -> int:
    """A port nobody listens on, outside the ranges from which the kernel and Mooncake take theirs."""
    while True:
        port = random.randrange(18_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
