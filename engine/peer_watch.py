"""Frees a rank whose step thread waits on its device for a peer that is gone.

Between CPU ranks a broken connection ends every wait. A GPU waits for its peers inside a kernel and would wait for
ever, and the host with it. So a thread of its own watches the connections of the group for their end.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

from engine.peer_mesh import PeerMesh

log = logging.getLogger(__name__)


class PeerWatch:
    """Started with the group, stopped before it is closed."""

    def __init__(self, mesh: PeerMesh, abort: Callable[[], None], *, grace_s: float = 2.0) -> None:
        """abort: makes collectives fail that wait for the lost peer, and returns at once. It is called when the step
        thread has not noticed the loss itself, or left, after `grace_s`; if it is still there after that time again,
        the process exits."""
        self._mesh = mesh
        self._abort = abort
        self._grace_s = grace_s
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self._stop, select.POLLIN)
        for descriptor in self._mesh.descriptors:
            poller.register(descriptor, select.POLLRDHUP)
        poller.poll()
        if self._stopped.wait(self._grace_s) or self._mesh.is_over:
            return
        log.error("rank %d lost a peer and is elsewhere: ending what may wait for it", self._mesh.rank)
        self._abort()
        if not self._stopped.wait(self._grace_s) and not self._mesh.is_over:
            log.critical("rank %d has still not noticed that a peer is gone: the process exits", self._mesh.rank)
            os._exit(1)
