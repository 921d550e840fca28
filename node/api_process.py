"""An API process beside the node process: the same HTTP surface on the same port, for more streams than a core carries.

It shares the fate of the node, as the engine ranks do: its requests live on in every rank when it ends, so the node
ends too, with the reason, and is started again as a whole by whoever watches over it. Routers carry the streams on
elsewhere meanwhile.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from api.tokenizer import Tokenizer
from node.engine_link import EngineLink
from node.http_surface import HttpSurface, SurfaceSpec
from runtime import logging as logs
from runtime.errors import TandemError
from runtime.process import ChildProcess

log = logging.getLogger(__name__)

_STOP_S = 5.0


class ApiProcess:
    """Started, watched and stopped by the node process."""

    def __init__(self, spec: SurfaceSpec) -> None:
        self.name = f"API process {spec.info.process}"
        # The child says once that it is ready, and is told to open and at the end to finish. It stops when the pipe
        # closes, which it also does when its parent dies.
        self._control, self._childs_end = multiprocessing.Pipe()
        self._process = ChildProcess(self.name, run_api, spec, self._childs_end)
        self._ready: asyncio.Future[None] | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._process.start()
        self._childs_end.close()
        loop.add_reader(self._control.fileno(), self._on_ready)

    def _on_ready(self) -> None:
        assert self._ready is not None
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        with contextlib.suppress(EOFError, OSError):
            self._control.recv_bytes()
            if not self._ready.done():
                self._ready.set_result(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_ready(self, deadline_s: float) -> None:
        """Raises ProcessDied."""
        assert self._ready is not None
        await self._process.until(self._ready, deadline_s)

    async def died(self) -> str:
        """Wait for the process's end; returns what to say about it."""
        return f"{self.name} ended with exit code {await self._process.died()}"

    def open(self) -> None:
        """Every process is ready: listen on the node's port."""
        with contextlib.suppress(OSError):  # It died, which whoever watches it hears.
            self._control.send_bytes(b"open")

    async def finish(self) -> None:
        """The ranks have drained: let the process pass on what they said last, and end."""
        with contextlib.suppress(OSError):
            self._control.send_bytes(b"finish")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await self._process.died()

    async def stop(self) -> None:
        """End it now: what is open fails."""
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        await self._process.stop(_STOP_S)


@contextlib.asynccontextmanager
async def api_processes(spec: SurfaceSpec, deadline_s: float) -> AsyncIterator[list[ApiProcess]]:
    """All API processes but the node process itself, ready; stopped on the way out. `spec` is that of the node process.

    Raises ProcessDied when one is not ready in time.
    """
    processes = [
        ApiProcess(msgspec.structs.replace(spec, info=msgspec.structs.replace(spec.info, process=number)))
        for number in range(1, spec.config.api_processes)
    ]
    try:
        for process in processes:
            process.start()
        await asyncio.gather(*(process.wait_ready(deadline_s) for process in processes))
        yield processes
    finally:
        await asyncio.gather(*(process.stop() for process in processes))


def run_api(spec: SurfaceSpec, control: Connection) -> None:
    """The process. Exits 1 with the reason logged when it cannot start."""
    import uvloop

    # A signal to the whole group is for the node process, which lets running streams finish first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logs.configure(f"{spec.info.role}/api{spec.info.process}", spec.config.log_level)
    try:
        uvloop.run(_serve(spec, control))
    except TandemError as error:
        log.error("%s", error)
        raise SystemExit(1) from None


async def _serve(spec: SurfaceSpec, control: Connection) -> None:
    tokenizer = Tokenizer.load(Path(spec.config.engine.model))
    links = [EngineLink(spec.channel(rank), spec.info.process) for rank in range(spec.info.num_ranks)]
    for link in links:
        link.open()
    surface = HttpSurface(spec, links, tokenizer)
    try:
        await surface.prepare()
        with contextlib.suppress(EOFError):
            control.send_bytes(b"ready")
            await _told(control)
            await surface.open()
            await _told(control)
            async with asyncio.timeout(_STOP_S):
                while surface.client.num_open:  # noqa: ASYNC110 (their last tokens are on their way)
                    await asyncio.sleep(0.02)
    except TimeoutError:
        log.warning("%d request(s) did not end", surface.client.num_open)
    finally:
        await surface.close()
        for link in links:
            link.close()


async def _told(control: Connection) -> None:
    """Wait for a word of the node process. Raises EOFError when it has closed the pipe, or died."""
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(control.fileno(), heard.set)
    try:
        await heard.wait()
    finally:
        loop.remove_reader(control.fileno())
    control.recv_bytes()
