"""What runs on the transfer thread: sender, receiver, streams, the engine, and the tasks that keep them going."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any

import grpc.aio

from kv_transfer.agent_events import AgentEvent, EpochRenewed
from kv_transfer.config import TransferConfig
from kv_transfer.descriptor import DescriptorError, read_descriptor
from kv_transfer.format import StateFormat
from kv_transfer.lane import Lanes
from kv_transfer.messages import Hello
from kv_transfer.mooncake import PROTOCOLS, MooncakeEngine, engine_version
from kv_transfer.peers import Peers
from kv_transfer.reader import Reader
from kv_transfer.receiver import Receiver
from kv_transfer.regions import MemoryRegion, PoolMemory
from kv_transfer.sender import Sender
from kv_transfer.service import HandoffService
from kv_transfer.stats import TransferCounters
from kv_transfer.threads import run_in_thread
from proto import handoff_pb2_grpc as pb_grpc
from runtime.grpc import bind, open_server
from runtime.requests import TransferStats

log = logging.getLogger(__name__)

_TICK_S = 0.001
"""The loop's timers may be this late."""
_SLOW_NAP_S = 0.005
_PATIENCE_S = 0.05
"""Naps are the reader's while reads end, longer after this long without any."""
_WATCH_EVERY_S = 0.5
_RENEW_EVERY_S = 0.1
"""How often leases are looked at; each is renewed when a quarter of it has passed."""
_WEDGED_AFTER_FAILURES = 3


class Stop(Exception):
    """Ends the task group: the agent is asked to stop."""


class TransferCore:
    """Lives on the transfer thread's loop. `emit` may be called from it at any time."""

    def __init__(
        self,
        config: TransferConfig,
        state_format: StateFormat,
        *,
        pages: MemoryRegion,
        slots: MemoryRegion,
        port: int,
        memory: PoolMemory,
        emit: Callable[[AgentEvent], None],
    ) -> None:
        self.config = config
        self._format = state_format
        self._pages = pages
        self._slots = slots
        self._port = port
        self._memory = memory
        self._emit = emit
        self._clock = time.monotonic
        self._counters = TransferCounters()
        self._tasks: asyncio.TaskGroup
        self._work = asyncio.Event()
        self._stop = asyncio.Event()
        self._recreated_at = 0.0
        self.epoch = ""
        self.address = ""
        self.latest_stats: TransferStats | None = None
        """At most `_WATCH_EVERY_S` old; for other threads to look at."""
        self.sender = Sender(
            config,
            slots=slots,
            pages=pages,
            read_bytes=memory.read,
            emit=emit,
            clock=self._clock,
            counters=self._counters,
            epoch=lambda: self.epoch,
        )
        self.receiver = Receiver(
            config,
            pages=pages,
            slots=slots,
            read_bytes=memory.read,
            emit=emit,
            clock=self._clock,
            counters=self._counters,
            spawn=self._spawn,
            link_to=lambda address, epoch: self._peers.link_to(address, epoch),
        )
        self._peers = Peers(
            config,
            self.receiver,
            my_hello=self._hello,
            probe=self._probe,
            spawn=self._spawn,
            clock=self._clock,
        )
        self._lanes = Lanes(config.tls, config.connect_timeout_s)
        self._service = HandoffService(self.sender, self._hello, self._lanes, config.connect_timeout_s)

    async def run(self, on_started: Callable[[], None]) -> None:
        """Until `stop`. Raises what keeps it from starting or going on."""
        server = open_server()
        pb_grpc.add_HandoffServicer_to_server(self._service, server)  # type: ignore[no-untyped-call]
        host = self.config.bind_host or self.config.host
        port = bind(server, host, self._port, self.config.tls)
        self._create_engine()
        try:
            await self._lanes.start(host, self.config.port_range)
            await server.start()
            self.address = f"{self.config.host}:{port}"
            on_started()
            log.info("hand-off service at %s, epoch %s", self.address, self.epoch)
            await self._run_tasks()
        finally:
            await self._shut_down(server)

    async def _run_tasks(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for task in (self._pump(), self._renew(), self._watch(), self._until_stopped()):
                    self._tasks.create_task(task)
        except* Stop:
            pass

    def stop(self) -> None:
        self._stop.set()

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        await self._settle()
        raise Stop

    async def _settle(self) -> None:
        """Tell every peer that it is over, and wait for reads in flight and for leases that peers may rely on."""
        self.receiver.cancel_all()
        self.sender.cancel_all("the prefill rank is stopping")
        give_up_at = self._clock() + self.config.stop_grace_s
        while (self.receiver.open_ids or self.sender.open_ids) and self._clock() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._peers.close_all()
        while self._peers.running and self._clock() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _shut_down(self, server: grpc.aio.Server) -> None:
        await server.stop(grace=0.2)
        self._lanes.close()
        self._close_engine()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.create_task(work, name=name)

    async def _probe(self, session_id: str) -> str | None:
        """None if that transfer engine answers and uses our transport, else what is wrong with it."""
        host, _, port = session_id.rpartition(":")
        timeout_s = self.config.connect_timeout_s
        try:
            descriptor = await run_in_thread(lambda: read_descriptor(host, int(port), timeout_s), "probe")
        except DescriptorError as error:
            return f"the transfer engine does not answer: {error}"
        protocol, wanted = descriptor.get("protocol"), PROTOCOLS[self.config.transport]
        return None if protocol == wanted else f"the transfer engine {session_id} uses {protocol!r}, not {wanted!r}"

    def _hello(self) -> Hello:
        return Hello(
            epoch=self.epoch,
            session_id=self._engine.session_id,
            transport=self.config.transport,
            engine_version=engine_version(),
            format_digest=self._format.digest,
            format_summary=self._format.summary,
            pages=self._pages,
            slots=self._slots,
            lease_s=self.config.lease_s,
        )

    # ---- the engine -------------------------------------------------------------------------------------------------

    def _create_engine(self) -> None:
        self._engine = MooncakeEngine(self.config, (self._pages, self._slots), self._memory)
        self.epoch = secrets.token_hex(16)
        self.receiver.reader = Reader(
            self._engine,
            window=self.config.window,
            clock=self._clock,
            counters=self._counters,
            wake=self._work.set,
        )

    def _close_engine(self) -> None:
        self._engine.close(self.receiver.reader.handles)
        self.receiver.reader.close()

    def _recreate_engine(self, reason: str) -> None:
        """The last fence: afterwards no read from before exists, and every peer has to meet us anew."""
        log.error("re-creating the transfer engine: %s", reason)
        self._counters.recreations += 1
        self._recreated_at = self._clock()
        self._close_engine()
        self._create_engine()
        self.receiver.fence()
        self.sender.cancel_all(f"the transfer engine was re-created: {reason}")
        # Only now: what the machines just said still goes out.
        self._peers.close_all()
        self._service.close_streams()
        self._emit(EpochRenewed(self.epoch))

    # ---- tasks ------------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        moved_at = 0.0
        while True:
            if not self.receiver.reader.busy:
                self._work.clear()
                await self._work.wait()
                moved_at = self._clock()
            reader = self.receiver.reader
            if reader.pump():
                moved_at = self._clock()
            quiet_s = self._clock() - moved_at
            if reader.busy and quiet_s < self._engine.spin_s:
                await asyncio.sleep(0)
            elif quiet_s > _PATIENCE_S:
                await asyncio.sleep(_SLOW_NAP_S)
            elif (nap_s := reader.nap_s) > 2 * _TICK_S:
                await asyncio.sleep(nap_s - _TICK_S)
            else:
                # Too short for the loop's timers. After the last read a nap lets the engine's thread, which was just
                # woken, have the interpreter first.
                time.sleep(min(nap_s, _TICK_S))  # noqa: ASYNC251
                await asyncio.sleep(0)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            self.receiver.renew()

    async def _watch(self) -> None:
        """Re-create the engine when quarantine grows too large, a read never ends, or a session is wedged."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            self.latest_stats = self.stats()
            reason = self._trouble() or await self._wedged()
            if reason is not None and not self.receiver.reader.is_opening:
                self._recreate_engine(reason)

    def _trouble(self) -> str | None:
        pages, limit = self.receiver.quarantine.num_pages, self.config.max_quarantine_pages
        if pages > limit:
            return f"{pages} pages are quarantined, {limit} are allowed"
        oldest = self.receiver.reader.oldest_submitted
        if oldest is not None and self._clock() - oldest > self.config.recreate_after_s:
            return f"a read has not ended for {self._clock() - oldest:.1f} s"
        return None

    async def _wedged(self) -> str | None:
        """A session whose reads all fail although its peer answers: only a new engine reaches it again."""
        if self._clock() - self._recreated_at < self.config.recreate_after_s:
            return None
        reader = self.receiver.reader
        for session_id in reader.failing_sessions():
            answers = await self._probe(session_id) is None
            if reader.is_wedged(session_id, answers, _WEDGED_AFTER_FAILURES):
                return f"reads from {session_id} fail although it answers"
        return None

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def stats(self) -> TransferStats:
        counters, reader, quarantine = self._counters, self.receiver.reader, self.receiver.quarantine
        oldest = reader.oldest_submitted
        return TransferStats(
            reads_submitted=counters.reads_submitted,
            reads_done=counters.reads_done,
            reads_failed=counters.reads_failed,
            bytes_received=counters.bytes_received,
            received=counters.received,
            receives_failed=counters.receives_failed,
            sends_ended=dict(counters.sends_ended),
            claims_refused=counters.claims_refused,
            leases_lapsed=counters.leases_lapsed,
            recreations=counters.recreations,
            sending=len(self.sender.open_ids),
            receiving=len(self.receiver.open_ids),
            reads_in_flight=reader.num_in_flight,
            oldest_read_s=0.0 if oldest is None else self._clock() - oldest,
            quarantined_pages=quarantine.num_pages,
            quarantined_s=quarantine.oldest_s,
            peers=self._peers.num_links + self._service.num_streams,
        )

    def check_integrity(self) -> None:
        self.sender.check_integrity()
        self.receiver.check_integrity()
