"""The real vllm-router in front of nodes of a test cluster, with the flags of the model's guide."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import aiohttp

from tests.cluster.harness import Program, free_port

START_S = 60.0


class VllmRouter:
    """One process. Start it when its nodes are up: it looks at them once, then every 30 s."""

    def __init__(
        self, directory: Path, prefill: Sequence[Program], decode: Sequence[Program], *, request_timeout_s: int = 30
    ) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log_path = directory / "vllm-router.log"
        nodes = []
        for node in prefill:
            nodes += ["--prefill", node.url, str(node.config["bootstrap_port"])]
        for node in decode:
            nodes += ["--decode", node.url]
        ranks = max(node.config.get("data_parallel_size", 1) for node in (*prefill, *decode))
        self._command = [
            sys.executable, "-m", "vllm_router.launch_router", "--policy", "round_robin", "--vllm-pd-disaggregation",
            *nodes, "--host", "127.0.0.1", "--port", self.url.rpartition(":")[2],
            "--intra-node-data-parallel-size", str(ranks), "--kv-connector", "mooncake",
            "--prometheus-port", str(free_port()), "--request-timeout-secs", str(request_timeout_s),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        self._process = self._spawn()
        deadline = time.monotonic() + START_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                try:
                    async with session.get(f"{self.url}/readiness") as response:
                        if response.status == 200:
                            return self
                except aiohttp.ClientError:
                    pass
                if self._process.poll() is not None or time.monotonic() > deadline:
                    await self.__aexit__()
                    raise AssertionError(f"vllm-router did not come up:\n{self._log_path.read_text()[-4000:]}")
                await asyncio.sleep(0.1)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, 15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
