"""One engine rank as the node process sees it, which owns it: a link to it, and the child process itself."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from node.engine_link import EngineLink
from runtime.channel import ChannelAddress, announce
from runtime.errors import ProcessDied
from runtime.process import ChildProcess
from runtime.requests import (
    Drain,
    Drained,
    EngineReady,
    EpochChanged,
    ExpertLoad,
    FromEngine,
    GroupDrains,
    RankLost,
    Shutdown,
)

log = logging.getLogger(__name__)


class EngineProcess(EngineLink):
    """Starts one rank, waits for it, stops it. Owned by the node."""

    def __init__(self, name: str, address: ChannelAddress, target: Callable[..., None], *args: Any) -> None:
        super().__init__(address)
        self.on_epoch: Callable[[EpochChanged], None] = lambda _: None
        self.on_group_drains: Callable[[], None] = lambda: None
        self.expert_load: ExpertLoad | None = None
        """The newest counters, where they are kept."""
        self._process = ChildProcess(name, target, address, *args)
        self._ready: asyncio.Future[EngineReady] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._about: EngineReady | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._drained = loop.create_future()
        self.open()
        self._process.start()

    async def wait_ready(self, deadline_s: float) -> EngineReady:
        """What the rank says about itself once it can take work. Raises ProcessDied."""
        assert self._ready is not None
        return await self._process.until(self._ready, deadline_s)

    @property
    def about(self) -> EngineReady:
        """The rank's description, with the newest epoch."""
        assert self._about is not None
        return self._about

    def trouble(self) -> str | None:
        """None when the rank can take work, else why not."""
        if not self._process.alive:
            return f"engine rank {self.rank} is not running"
        if self._about is None:
            return f"engine rank {self.rank} is not ready"
        return None

    async def died(self) -> str:
        """Wait for the process's end; returns what to say about it."""
        code = await self._process.died()
        return f"engine rank {self.rank} ended with exit code {code}"

    def lose(self, reason: str) -> None:
        """The process ended by itself: every request on it ends, in every API process."""
        lost = RankLost(self.rank, reason)
        self.receive(lost)
        announce(self.address, lost)

    async def drain(self, deadline_s: float) -> bool:
        """Let the rank finish what runs and what it promised. False when it did not within the deadline."""
        if self.trouble() is not None:
            return False
        assert self._drained is not None
        self.send(Drain())
        try:
            await self._process.until(self._drained, deadline_s)
        except ProcessDied as error:
            log.warning("rank %d did not drain: %s", self.rank, error)
            return False
        return True

    async def stop(self, grace_s: float) -> None:
        if self._process.alive:
            self.send(Shutdown())
        await self._process.stop(grace_s)
        self.close()

    def receive(self, message: FromEngine) -> None:
        match message:
            case EngineReady():
                self._about = message
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(message)
            case EpochChanged():
                assert self._about is not None
                self._about = msgspec.structs.replace(
                    self._about, epoch=message.epoch, handoff_address=message.handoff_address
                )
                self.on_epoch(message)
            case GroupDrains():
                self.on_group_drains()
            case ExpertLoad():
                self.expert_load = message
            case Drained():
                if self._drained is not None and not self._drained.done():
                    self._drained.set_result(None)
        super().receive(message)
