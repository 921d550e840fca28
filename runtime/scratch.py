"""A directory for the sockets of one node: nobody else can enter it, and it does not outlive the node for long.

A process that is killed cannot clean up. Its directory is removed by the next node that starts on the host, which can
tell because the lock that a living owner holds is free.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "tandem-node-"
_YOUNG_S = 60.0
"""A directory may be this old and not locked yet."""


@contextlib.contextmanager
def scratch_directory() -> Iterator[str]:
    """A new directory, mode 0700, removed on the way out."""
    _remove_left_over()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as directory:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield directory
        finally:
            os.close(descriptor)


def _remove_left_over() -> None:
    """Directories of this user whose owner is dead."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = directory.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _YOUNG_S:
                continue
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(descriptor)
