"""The processes of the churn run: a router and nodes on loopback, started, drained, killed and started again."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

import aiohttp
import yaml

from benchmarks.ports import free_port

Role = Literal["prefill", "decode"]

READY_S = 120.0
STOP_S = 60.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Process:
    """`python -m <module>` with one configuration, for as many lives as it takes. Its log goes to a file."""

    def __init__(self, name: str, module: str, directory: Path, config: dict[str, Any]) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{config.get('server', config)['port']}"
        self._module = module
        self._config = directory / f"{name}.yaml"
        self._log = directory / f"{name}.log"
        self._config.write_text(yaml.safe_dump(config))
        self._process: asyncio.subprocess.Process | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Returns once its HTTP port answers. Raises RuntimeError with the end of its log when it does not."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module, "--config", str(self._config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        deadline = time.monotonic() + READY_S
        while not await answers(self.url):
            if not self.running or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not come up:\n{self.log_tail()}")
            await asyncio.sleep(0.1)

    async def drain(self) -> None:
        """SIGTERM. Raises RuntimeError when it does not end in time, or not with 0."""
        assert self._process is not None
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                code = await self._process.wait()
        except TimeoutError:
            await self.kill()
            raise RuntimeError(f"{self.name} did not end within {STOP_S:g} s of SIGTERM") from None
        if code != 0:
            raise RuntimeError(f"{self.name} ended with {code} after SIGTERM:\n{self.log_tail()}")

    async def kill(self) -> None:
        """SIGKILL, to all of its processes."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def rss_mib(self) -> float:
        """Resident memory of it and its children."""
        assert self._process is not None
        return sum(_rss_bytes(pid) for pid in _family(self._process.pid)) / 2**20


def _family(pid: int) -> list[int]:
    pids = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids.extend(child for word in path.read_text().split() for child in _family(int(word)))
    return pids


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


async def answers(url: str) -> bool:
    """Whether something serves HTTP there; a router is not healthy before its nodes are."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(f"{url}/v1/models") as response,
        ):
            await response.read()
            return True
    except (aiohttp.ClientError, TimeoutError):
        return False


class Fleet:
    """All processes of the run."""

    def __init__(self, directory: Path, checkpoint: Path) -> None:
        self._directory = directory
        self._cluster_port = free_port()
        self._engine = {
            "model": str(checkpoint),
            "device": "cpu",
            # What a token's state is must not depend on which node computed it, and when.
            "numerics": "plain",
            "dtype": "float32",
            "block_size": 32,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 256,
            "num_pages": 512,
        }
        router = {
            "server": {"port": free_port()},
            "cluster": {"port": self._cluster_port},
            "health": {"canary_interval_s": 2.0},
        }
        self.router = Process("router", "router", directory, router)
        self.nodes: dict[str, Process] = {}
        self._numbers = dict.fromkeys(("prefill", "decode"), 0)

    def new_node(self, role: Role) -> Process:
        """A node nobody has seen before."""
        name = f"{role}{self._numbers[role]}"
        self._numbers[role] += 1
        config = {
            "port": free_port(),
            "engine": self._engine,
            "membership": {"routers": [f"127.0.0.1:{self._cluster_port}"], "max_retry_s": 1.0},
            "drain_timeout_s": 30.0,
        }
        self.nodes[name] = Process(name, f"{role}_node", self._directory, config)
        return self.nodes[name]

    async def stop(self) -> None:
        for process in (self.router, *self.nodes.values()):
            await process.kill()
