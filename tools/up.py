"""Start a whole cluster on this machine from one YAML, wait until it answers end to end, stop it with one Ctrl-C.

    python -m tools.up --config configs/local/cluster.yaml [--demo]

Every process logs under its own name. `--demo` sends one chat request once the path is proven and shows what it cost.
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import msgspec

from runtime import config as configuration
from runtime import logging as logs
from runtime.errors import ConfigError, ProcessDied, TandemError
from runtime.serve import run
from tools.demo import demo

log = logging.getLogger("up")


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    module: str
    config: str
    """Relative to the cluster's own file."""
    set: tuple[str, ...] = ()
    """Overrides, as for `--set`."""
    env: dict[str, str] = {}
    """Added to the environment, such as CUDA_VISIBLE_DEVICES for nodes that share a machine."""


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    processes: tuple[ProcessConfig, ...]
    url: str
    """The router. Its /health tells which nodes have really answered a request together."""
    decode_metrics: str = ""
    """Where the demo reads what one hand-off cost; empty: not shown."""
    ready_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0


def _die_with_parent() -> None:
    """In the child: be asked to stop if the launcher is killed (Linux, PR_SET_PDEATHSIG = 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Console:
    """Where the processes' lines go. While held, they wait, so that the demo's answer stays in one piece."""

    def __init__(self) -> None:
        self._held: list[str] | None = None

    def line(self, text: str) -> None:
        if self._held is None:
            print(text, flush=True)
        else:
            self._held.append(text)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            for text in held:
                self.line(text)


class Program:
    """One process of the cluster, in its own session so that Ctrl-C reaches only the launcher."""

    def __init__(self, config: ProcessConfig, directory: Path, width: int) -> None:
        self.name = config.name
        self._config = config
        self._directory = directory
        self._width = width
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        overrides = [word for override in self._config.set for word in ("--set", override)]
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self._config.module, "--config", str(self._directory / self._config.config)),
            *overrides,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | self._config.env,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    async def watch(self, console: Console) -> None:
        """Pass its output on, line by line, and raise ProcessDied at its end."""
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            console.line(f"{self.name:{self._width}} | {line.decode(errors='replace').rstrip()}")
        raise ProcessDied(f"{self.name} ended with exit code {await self._process.wait()}")

    async def stop(self, grace_s: float) -> None:
        """Ask, wait, kill with everything it started."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
            except TimeoutError:
                log.warning("%s did not stop within %g s: killing it", self.name, grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


async def wait_until_proven(url: str, deadline_s: float, *, handed_over: bool) -> None:
    """Until the router says that a request went all the way, with `handed_over` from a prefill to a decode node: a
    decode node that is up first can serve alone. Raises ProcessDied with the router's last word.
    """
    word = "no answer yet"
    deadline = time.monotonic() + deadline_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while time.monotonic() < deadline:
            try:
                async with session.get(f"{url}/health") as response:
                    word = (await response.text()).strip()
                    if response.status == 200 and (not handed_over or _shows_handover(word)):
                        return
            except (aiohttp.ClientError, TimeoutError) as error:
                word = str(error) or type(error).__name__
            await asyncio.sleep(0.1)
    raise ProcessDied(f"no request went end to end within {deadline_s:g} s; the router last said: {word}")


def _shows_handover(report: str) -> bool:
    """Whether some proven pair in the router's /health has a prefill node."""
    return any(pair["prefill"] is not None for pair in json.loads(report)["proven"])


@contextlib.asynccontextmanager
async def cluster(config: ClusterConfig, directory: Path) -> AsyncIterator[list[Program]]:
    """The cluster's processes, started; on the way out stopped in the same order, the router before its nodes."""
    width = max(len(process.name) for process in config.processes)
    programs = [Program(process, directory, width) for process in config.processes]
    try:
        for program in programs:
            await program.start()
        yield programs
    finally:
        for program in programs:
            await program.stop(config.stop_timeout_s)


async def up(config: ClusterConfig, directory: Path, show_demo: bool, stopping: asyncio.Event) -> None:
    console = Console()

    async def serve() -> None:
        began = time.monotonic()
        handed_over = any(process.module == "prefill_node" for process in config.processes)
        await wait_until_proven(config.url, config.ready_timeout_s, handed_over=handed_over)
        log.info("ready after %.1f s: serving on %s", time.monotonic() - began, config.url)
        if show_demo:
            with console.hold():
                await demo(config.url, config.decode_metrics)
            print(f"\nserving on {config.url} (OpenAI API); Ctrl-C stops everything\n", flush=True)
        await stopping.wait()

    watchers: list[asyncio.Task[None]] = []
    tasks = [asyncio.create_task(serve()), asyncio.create_task(stopping.wait())]
    try:
        async with cluster(config, directory) as programs:
            watchers = [asyncio.create_task(program.watch(console)) for program in programs]
            done, _ = await asyncio.wait([*tasks, *watchers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *watchers, return_exceptions=True)


def main() -> None:
    parser = configuration.argument_parser("python -m tools.up", "Start a cluster on this machine and watch over it.")
    parser.add_argument("--demo", action="store_true", help="send one chat request when ready and show what it cost")
    arguments = parser.parse_args()
    logs.configure("up")
    try:
        if arguments.config is None:
            raise ConfigError("--config is required, e.g. --config configs/local/cluster.yaml")
        config = configuration.load(arguments.config, ClusterConfig, arguments.overrides)
        if arguments.check:
            print(configuration.dump(config))
            return
        run(lambda stopping: up(config, arguments.config.parent, arguments.demo, stopping))
    except TandemError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
