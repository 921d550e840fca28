"""Real processes on loopback for the cluster tests: started from the same commands and YAML keys an operator uses."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0
"""For all processes of a cluster to serve: nine of them start at once on two cores that others use too."""


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


class Program:
    """`python -m <module> --config <yaml>` with its log in a file."""

    def __init__(
        self, directory: Path, name: str, module: str, config: dict[str, Any], within: Sequence[str] = ()
    ) -> None:
        """`within`: the beginning of a command line that runs what follows it somewhere else."""
        self.name = name
        self._within = within
        self.module = module
        self.config = config
        self.log_path = directory / f"{name}.log"
        self._config_path = directory / f"{name}.yaml"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        server = self.config.get("server", self.config)
        return f"http://{server['host']}:{server['port']}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self._config_path.write_text(yaml.safe_dump(self.config))
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._within, sys.executable, "-m", self.module, "--config", str(self._config_path)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def signal(self, number: int) -> None:
        """To the API process and its engine processes alike."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop(self, grace_s: float = 15.0) -> int:
        """Ask, wait, kill; returns the exit code."""
        assert self._process is not None
        self.signal(signal.SIGCONT)
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
        return self._process.wait()

    def kill(self) -> None:
        assert self._process is not None
        self.signal(signal.SIGKILL)
        self._process.wait()

    @property
    def exit_code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


class Cluster:
    """A router and its nodes. Node configs are the local ones, with `engine` and `transfer` keys changed at will."""

    def __init__(
        self,
        directory: Path,
        checkpoint: Path,
        *,
        prefill: Sequence[dict[str, Any]] = ({},),
        decode: Sequence[dict[str, Any]] = ({},),
        both: dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
    ) -> None:
        cluster_port = free_port()
        common: dict[str, Any] = {
            "host": "127.0.0.1",
            "drain_timeout_s": 5.0,
            "engine": {
                "model": str(checkpoint),
                "device": "cpu",
                "max_num_seqs": 64,
                "max_num_batched_tokens": 512,
                "kv_cache_memory_bytes": 128 * 2**20,
            },
            "membership": {"routers": [f"127.0.0.1:{cluster_port}"]},
        }
        common = merged(common, both or {})
        self.router = Program(
            directory,
            "router",
            "router",
            merged(
                {"server": {"host": "127.0.0.1", "port": free_port()}, "cluster": {"port": cluster_port}}, router or {}
            ),
        )
        self.prefill = [
            Program(directory, f"prefill{i}", "prefill_node", merged(common | {"port": free_port()}, extra))
            for i, extra in enumerate(prefill)
        ]
        self.decode = [
            Program(directory, f"decode{i}", "decode_node", merged(common | {"port": free_port()}, extra))
            for i, extra in enumerate(decode)
        ]

    @property
    def url(self) -> str:
        return self.router.url

    @property
    def programs(self) -> list[Program]:
        return [self.router, *self.prefill, *self.decode]

    async def __aenter__(self) -> "Cluster":
        for program in self.programs:
            program.start()
        try:
            await self.wait_proven()
            for node in [*self.prefill, *self.decode]:
                await wait_healthy(node.url, START_S, self.programs)
            await self.wait_joined()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for program in reversed(self.programs):
            await asyncio.to_thread(program.stop)

    async def wait_proven(self, deadline_s: float = START_S) -> None:
        await wait_healthy(self.url, deadline_s, self.programs)

    async def wait_joined(self, deadline_s: float = 30.0) -> None:
        """Until the router knows every node."""
        deadline = time.monotonic() + deadline_s
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                async with session.get(f"{self.url}/workers") as response:
                    text = await response.text()
                if all(node.url in text for node in [*self.prefill, *self.decode]):
                    return
                assert time.monotonic() < deadline, f"not all nodes joined: {text}"
                await asyncio.sleep(0.1)

    async def wait_idle(self, deadline_s: float = 30.0) -> None:
        """Until nothing is held, received or quarantined on any rank of any node that runs: the audit from outside."""
        for node in [*self.prefill, *self.decode]:
            if node.exit_code is None:
                await wait_idle(node.url, deadline_s)


async def wait_healthy(url: str, deadline_s: float, programs: Sequence[Program]) -> None:
    word = "nothing"
    deadline = time.monotonic() + deadline_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while time.monotonic() < deadline:
            for program in programs:
                assert program.exit_code is None, f"{program.name} ended:\n{program.log()[-4000:]}"
            try:
                async with session.get(f"{url}/health") as response:
                    word = await response.text()
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError) as error:
                word = repr(error)
            await asyncio.sleep(0.1)
    logs = "\n".join(f"--- {program.name}\n{program.log()[-3000:]}" for program in programs)
    raise AssertionError(f"not healthy after {deadline_s} s, last word: {word}\n{logs}")


async def ranks(url: str) -> list[dict[str, Any]]:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
        session.get(f"{url}/cluster/ranks") as response,
    ):
        assert response.status == 200
        result: list[dict[str, Any]] = await response.json()
        return result


def disorder(rank: dict[str, Any]) -> str:
    """What keeps a rank from being idle and clean; empty when nothing does."""
    busy = {key: rank[key] for key in ("running", "waiting", "receiving", "held", "pages_quarantined") if rank[key]}
    for kind in ("pages", "slots"):
        if rank[f"{kind}_free"] != rank[f"{kind}_total"] or not rank[f"{kind}_total"]:
            busy[kind] = f"{rank[f'{kind}_free']} of {rank[f'{kind}_total']} free"
    return ", ".join(f"{key}={value}" for key, value in busy.items())


async def wait_idle(url: str, deadline_s: float = 30.0) -> None:
    deadline = time.monotonic() + deadline_s
    while True:
        words = [word for rank in await ranks(url) if (word := disorder(rank))]
        if not words:
            return
        assert time.monotonic() < deadline, f"{url} is not idle after {deadline_s} s: {words}"
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def standalone(directory: Path, checkpoint: Path, extra: dict[str, Any] | None = None) -> AsyncIterator[Program]:
    """One decode node that serves alone."""
    config: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": free_port(),
        "prefill": "local",
        "engine": {
            "model": str(checkpoint),
            "device": "cpu",
            "max_num_seqs": 64,
            "max_num_batched_tokens": 512,
            "kv_cache_memory_bytes": 128 * 2**20,
        },
    }
    program = Program(directory, "standalone", "decode_node", merged(config, extra or {}))
    program.start()
    try:
        await wait_healthy(program.url, START_S, [program])
        yield program
    finally:
        await asyncio.to_thread(program.stop)
