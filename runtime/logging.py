"""Logging for every process: one line per state change on stderr, with time, role and, if bound, the request."""

import contextvars
import logging
import sys
import time

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Bound once where a request enters; every line logged on its behalf carries it."""


class _Formatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        bound = request_id.get()
        line = (
            f"{clock}.{int(record.msecs):03d} {record.levelname[0]} {self._role} {record.name}: "
            f"{f'[{bound}] ' if bound else ''}{record.getMessage()}"
        )
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


def configure(role: str, level: str = "info") -> None:
    """Set this process up. Called from `__main__` and from the targets of child processes, nowhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("asyncio", "aiohttp.access", "grpc", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
