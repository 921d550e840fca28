"""How a rank lets go of its device, whatever its peers have done.

A step whose collective waits for a peer that is gone never ends by itself, and destroying a captured step while it runs
waits for it with the interpreter locked: then nothing in the process can end it any more. So the group is given up
first, which lets its collectives go, then the device has to fall quiet, and only then are captured steps destroyed.
"""

from __future__ import annotations

import faulthandler
import logging
from typing import TYPE_CHECKING

from engine.device import wait_until_quiet

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.rank_group import RankGroup

log = logging.getLogger(__name__)

_QUIET_S = 3.0
"""For the steps under way to end by themselves, and again once the group has been given up."""
_LAST_S = 20.0
"""Longer than all of it together. What then still hangs is shown, and the process exits."""


def end_rank(engine: Engine | None, group: RankGroup | None) -> None:
    """The end of both, on the step thread. Why the rank ends is to be said before: this may not return."""
    if group is None:
        if engine is not None:
            engine.close()
        return
    # By a thread that needs no interpreter lock.
    faulthandler.dump_traceback_later(_LAST_S, exit=True)
    if group.mesh.is_lost:
        group.abort()
    quiet = wait_until_quiet(group.device, _QUIET_S)
    if not quiet:
        group.abort()
        quiet = wait_until_quiet(group.device, _QUIET_S)
    if engine is not None and quiet:
        engine.close()
    group.close()
    if quiet:
        faulthandler.cancel_dump_traceback_later()
    else:
        log.critical("rank %d: its device does not come to an end; the process exits as it is", group.rank)
