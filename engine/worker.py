"""The main loop of an engine process: messages in, steps, messages out; asleep when there is nothing to do."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.engine import Engine
from engine.expert_load import ExpertLoadReport
from engine.profiling import StepTracer
from runtime.channel import EngineChannel
from runtime.errors import TandemError
from runtime.process import calm_garbage_collector
from runtime.requests import (
    Abort,
    Drain,
    EngineReady,
    EngineStats,
    FromEngine,
    ReleaseTransfer,
    ResetPrefixCache,
    Shutdown,
    Submit,
    ToEngine,
    TransferStats,
)

log = logging.getLogger(__name__)


class EngineWorker:
    """Serves one engine on one channel until `Shutdown`. Everything runs on the calling thread."""

    def __init__(
        self,
        engine: Engine,
        channel: EngineChannel,
        expert_load: ExpertLoadReport | None = None,
        transfer_stats: Callable[[], TransferStats | None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._interval_s = engine.config.stats_interval_s
        self._next_stats = 0.0
        self._sent: EngineStats | None = None
        config = engine.config
        self._tracer: StepTracer | None = None
        if config.profiler_dir is not None:
            self._tracer = StepTracer(Path(config.profiler_dir), config.profiler_steps, engine.rank)
            self._tracer.listen()
        self._expert_load = expert_load
        self._transfer_stats = transfer_stats

    def run(self, ready: EngineReady) -> None:
        """Announce the rank and serve. Returns on `Shutdown`.

        Raises ProcessDied when the API process is gone, and EngineError when the engine cannot go on; every request is
        told the reason before that, and what was said last has been handed to the channel.
        """
        self._channel.send(ready)
        try:
            while self._serve_once():
                pass
        except Exception as error:
            self._engine.fail_all(f"the engine process ends: {error}")
            for message in self._engine.take_messages():
                self._channel.send(message)
            raise
        finally:
            if self._tracer is not None:
                self._tracer.finish()

    def _serve_once(self) -> bool:
        idle_s = 0.0 if self._engine.has_work else max(0.0, self._next_stats - time.monotonic())
        for message in self._channel.receive(idle_s):
            if isinstance(message, Shutdown):
                log.info("asked to stop")
                self._engine.leave_group()
                return False
            self._dispatch(message)
        for said in self._step():
            self._channel.send(said)
        self._report()
        return True

    def _step(self) -> list[FromEngine]:
        if self._tracer is None or not self._engine.has_work:
            return self._engine.step()
        self._tracer.before_step()
        said = self._engine.step()
        self._tracer.after_step()
        return said

    def _dispatch(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._engine.submit(message)
            case Abort(request_id):
                self._engine.abort(request_id)
            case ReleaseTransfer(transfer_id):
                self._engine.release(transfer_id)
            case ResetPrefixCache():
                self._engine.reset_prefix_cache()
            case Drain():
                self._engine.drain()
                self._next_stats = 0.0

    def _report(self) -> None:
        """Tell the gauges, at most once an interval, and only news."""
        now = time.monotonic()
        if now < self._next_stats:
            return
        self._next_stats = now + self._interval_s
        stats = msgspec.structs.replace(self._engine.stats(), transfer=self._transfer_stats())
        if stats != self._sent:
            self._sent = stats
            self._channel.send(stats)
        if self._expert_load is not None and (load := self._expert_load.take(stats.steps)) is not None:
            self._channel.send(load)


def run_worker(
    engine: Engine,
    channel: EngineChannel,
    ready: EngineReady,
    expert_load: ExpertLoadReport | None = None,
    transfer_stats: Callable[[], TransferStats | None] = lambda: None,
) -> None:
    """Serve and close the channel, whatever ends the loop. Raises what `EngineWorker.run` raises.

    expert_load: counters to tell as well. transfer_stats: called for each report; it must not wait."""
    calm_garbage_collector()
    try:
        EngineWorker(engine, channel, expert_load, transfer_stats).run(ready)
    except TandemError as error:
        log.error("engine rank %d ends: %s", ready.rank, error)
        raise
    finally:
        channel.close()
