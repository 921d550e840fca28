"""Traces of some steps on request, and names for the phases of a step in whatever profiler watches.

`kill -USR2 PID` of an engine process records its next steps with torch's profiler and writes a trace for Perfetto or
chrome://tracing into the configured directory. NVTX ranges name the phases for Nsight Systems.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)

Span = Callable[[str], AbstractContextManager[object]]
"""Names what runs inside it."""

_NOTHING: AbstractContextManager[object] = contextlib.nullcontext()


def spans(ranges: bool, device: torch.device) -> Span:
    """Without `ranges` a span costs nothing."""
    if not ranges:
        return lambda name: _NOTHING
    if device.type != "cuda":
        named: Span = record_function
        return named

    @contextlib.contextmanager
    def span(name: str) -> Iterator[None]:
        with torch.cuda.nvtx.range(name), record_function(name):
            yield

    return span


class StepTracer:
    """Records `num_steps` steps after each request. Everything but `request` belongs to the step thread."""

    def __init__(self, directory: Path, num_steps: int, rank: int) -> None:
        self._directory = directory
        self._num_steps = num_steps
        self._rank = rank
        self._wanted = False
        self._left = 0
        self._recording: profile | None = None

    def listen(self) -> None:
        """Let SIGUSR2 ask for a trace. Only the main thread can; elsewhere nothing happens."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR2, lambda *_: self.request())

    def request(self) -> None:
        """From the next step on. Asking again while steps are recorded changes nothing."""
        self._wanted = True

    def before_step(self) -> None:
        if self._wanted and self._recording is None:
            self._wanted = False
            self._left = self._num_steps
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._recording = profile(activities=activities)
            self._recording.start()
            log.info("recording %d steps", self._num_steps)

    def after_step(self) -> None:
        if self._recording is None:
            return
        self._left -= 1
        if not self._left:
            self.finish()

    def finish(self) -> None:
        """Write what was recorded so far. A trace that cannot be written is logged: serving goes on."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        path = self._directory / f"rank{self._rank}-{time.time_ns() // 1_000_000}.json.gz"
        try:
            recording.stop()
            self._directory.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            log.error("the trace could not be written to %s: %s", path, error)
        else:
            log.info("trace of %d steps: %s", self._num_steps - self._left, path)
