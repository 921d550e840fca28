"""A prefill group and the router on one host, a decode group on another: states cross the cable, nothing else does."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.client import prompts_of_lengths
from tests.cluster.harness import ROOT, Program, disorder
from tests.cluster.two_hosts import Host, two_hosts

HTTP, CLUSTER, PREFILL, DECODE = 8000, 8001, 8002, 8003
ENGINE: dict[str, Any] = {
    "device": "cpu",
    "numerics": "plain",
    "dtype": "float32",
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_pages": 64,
}


class Deployment:
    """The four processes and their two hosts, seen from outside of both."""

    def __init__(self, left: Host, right: Host, programs: list[Program]) -> None:
        self.left = left
        self.right = right
        self.programs = programs

    def ask(self, host: Host, url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """(status, answer) of a request made on `host`; status 0: no connection."""
        command = [sys.executable, "-m", "tests.cluster.fetch", url, *([json.dumps(body)] if body is not None else [])]
        status, answer = json.loads(host.run("env", "-C", str(ROOT), *command))
        return status, answer

    def complete(self, host: Host, url: str, prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        status, answer = self.ask(host, f"{url}/v1/completions", body)
        assert status == 200, answer
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    def decode_ranks(self) -> list[dict[str, Any]]:
        status, answer = self.ask(self.right, f"{self.programs[2].url}/cluster/ranks")
        assert status == 200, answer
        ranks: list[dict[str, Any]] = answer
        return ranks

    def until(self, what: str, condition: Callable[[], bool], deadline_s: float = 100.0) -> None:
        deadline = time.monotonic() + deadline_s
        while not condition():
            for program in self.programs:
                assert program.exit_code is None, f"{program.name} ended:\n{program.log()[-4000:]}"
            assert time.monotonic() < deadline, f"{what}: not within {deadline_s} s\n" + "\n".join(
                program.log()[-2000:] for program in self.programs
            )
            time.sleep(0.2)

    def healthy(self) -> bool:
        return self.ask(self.left, f"{self.programs[0].url}/health")[0] == 200


@pytest.fixture(scope="module")
def deployment(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("two-hosts")

    def node(host: Host, port: int, **more: Any) -> dict[str, Any]:
        return {
            "host": host.address,
            "port": port,
            "engine": {"model": str(small_checkpoint), **ENGINE},
            "transfer": {"host": host.address, "claim_wait_s": 5.0, "connect_timeout_s": 2.0, "read_deadline_s": 2.0},
            "membership": {"routers": [f"10.77.0.1:{CLUSTER}"], "max_retry_s": 1.0},
            **more,
        }

    with two_hosts() as (left, right):
        router = {
            "server": {"host": left.address, "port": HTTP},
            "cluster": {"host": left.address, "port": CLUSTER},
            "deadlines": {"connect_s": 2.0},
            "requests": {"wait_for_node_s": 2.0},
        }
        programs = [
            Program(directory, "router", "router", router, left.within),
            Program(directory, "prefill", "prefill_node", node(left, PREFILL), left.within),
            Program(directory, "decode", "decode_node", node(right, DECODE, data_parallel_size=2), right.within),
        ]
        it = Deployment(left, right, programs)
        try:
            for program in programs:
                program.start()
            it.until("everything up", it.healthy)
            yield it
        finally:
            for program in reversed(programs):
                program.stop()


def test_prompts_cross_between_the_hosts_exactly(deployment: Deployment) -> None:
    it = deployment
    router, _, decode = it.programs
    prompts = prompts_of_lengths([1, 31, 200, 600], seed=3)
    expected = [it.complete(it.right, decode.url, prompt) for prompt in prompts]
    before = it.right.received_bytes(), sum(rank["bytes_received"] for rank in it.decode_ranks())
    assert [it.complete(it.left, router.url, prompt) for prompt in prompts] == expected
    ranks = it.decode_ranks()
    states = sum(rank["bytes_received"] for rank in ranks) - before[1]
    assert states > 0
    assert it.right.received_bytes() - before[0] >= states, "the states came over the cable"
    assert sum(rank["recomputed"] + rank["transfers_failed"] for rank in ranks) == 0
    assert all(rank["transfers_received"] for rank in ranks), "both ranks of the decode group took part"
    it.until("clean pools", lambda: not any(map(disorder, it.decode_ranks())))


def test_an_unplugged_cable_is_an_error_in_time_and_a_plugged_one_serves_again(deployment: Deployment) -> None:
    it = deployment
    url = it.programs[0].url
    (prompt,) = prompts_of_lengths([100], seed=4)
    expected = it.complete(it.left, url, prompt)
    it.right.plug(in_=False)
    try:
        # Within connect_s + wait_for_node_s or as soon as heartbeats are missed; fetch itself gives up after 60 s.
        status, answer = it.ask(it.left, f"{url}/v1/completions", {"prompt": prompt, "max_tokens": 16})
        assert status in (502, 503, 504), answer
        it.until("the router sees it", lambda: not it.healthy())
    finally:
        it.right.plug(in_=True)
    it.until("the node is back", it.healthy)
    assert it.complete(it.left, url, prompt) == expected
    it.until("clean pools", lambda: not any(map(disorder, it.decode_ranks())))
