"""What the router costs, and vllm-router beside it if it is installed: same nodes, same load, same minutes.

    python -m benchmarks.router [--peer PATH_TO_VLLM_ROUTER] [--seconds 3] [--quick]

Nodes, router and load generator are processes on one machine and share its cores, so requests per second say little by
themselves; CPU time per request and per event is taken from the router process's own clock and is the firmest figure.
The nodes are `benchmarks.router_stand_ins`, the load `benchmarks.router_load`. Columns: docs/router.md.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RANKS = 4
PREFILL_S = 0.02
Command = Callable[[dict[str, int], int], list[str]]
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def stand_ins(prefill_s: float) -> Iterator[dict[str, int]]:
    command = [sys.executable, "-m", "benchmarks.router_stand_ins", f"--ranks={RANKS}", f"--prefill-s={prefill_s}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(timeout=10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tandem_command(ports: dict[str, int], port: int, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "router", f"--port={port}",
        f"--prefill=http://127.0.0.1:{ports['prefill']}", f"--decode=http://127.0.0.1:{ports['decode']}",
        "--set", "cluster.port=null", "--set", "health.canary=false", "--set", "log_level=warning",
        *(word for option in options for word in ("--set", option)),
    ]  # fmt: skip


def peer_command(peer: str, ports: dict[str, int], port: int) -> list[str]:
    return [
        peer, "--policy", "round_robin", "--vllm-pd-disaggregation",
        "--prefill", f"http://127.0.0.1:{ports['prefill']}", str(ports["bootstrap"]),
        "--decode", f"http://127.0.0.1:{ports['decode']}", "--host", "127.0.0.1", "--port", str(port),
        "--intra-node-data-parallel-size", str(RANKS), "--kv-connector", "mooncake",
        "--prometheus-port", str(free_port()), "--log-level", "error",
    ]  # fmt: skip


@contextlib.contextmanager
def router(command: list[str], port: int) -> Iterator[tuple[str, int]]:
    """Run a router until it answers; gives its URL and process id."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        body = json.dumps({"model": "m", "prompt": "a", "max_tokens": 1, "user": "json"}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit(f"{command[0]} did not come up") from None
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(url: str, pid: int | None, *arguments: str) -> dict[str, Any]:
    """One run of the load generator, with the router's CPU time around it."""
    before = cpu_seconds(pid) if pid is not None else 0.0
    command = [sys.executable, "-m", "benchmarks.router_load", url, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result: dict[str, Any] = json.loads(done.stdout)
    result["cpu_s"] = cpu_seconds(pid) - before if pid is not None else 0.0
    result["rss_mib"] = rss_mib(pid) if pid is not None else 0.0
    if result["errors"] or result["broken"]:
        print(f"  ! {result['errors']} errors, {result['broken']} broken connections", file=sys.stderr)
    return result


def cells(url: str, pid: int | None, seconds: float, *, quick: bool) -> dict[str, float]:
    """All figures for one router, or for the nodes alone."""
    one = measure(url, pid, "--connections=1", f"--seconds={seconds}")
    many = measure(url, pid, "--connections=64", f"--seconds={seconds}")
    long = measure(url, pid, "--connections=16", f"--seconds={seconds}", "--body-bytes=32768")
    events = 200 if not quick else 50
    burst = measure(url, pid, "--connections=64", f"--stream={events},0")
    paced = measure(url, pid, "--connections=512", f"--stream={100 if not quick else 25},20000")
    return {
        "1: p50 us": 1e6 * one["latency_s"]["p50"],
        "1: p99 us": 1e6 * one["latency_s"]["p99"],
        "64: req/s": many["requests"] / many["seconds"],
        "64: cpu us/req": 1e6 * many["cpu_s"] / many["requests"],
        "64: p99 ms": 1e3 * many["latency_s"]["p99"],
        "32K: req/s": long["requests"] / long["seconds"],
        "32K: cpu us/req": 1e6 * long["cpu_s"] / long["requests"],
        "burst: events/s": burst["events"] / burst["seconds"],
        "burst: cpu us/ev": 1e6 * burst["cpu_s"] / burst["events"],
        "512: cpu us/ev": 1e6 * paced["cpu_s"] / paced["events"],
        "512: delay p50 ms": 1e3 * paced["delay_s"]["p50"],
        "512: delay p99 ms": 1e3 * paced["delay_s"]["p99"],
        "512: first p50 ms": 1e3 * paced["first_byte_s"]["p50"],
        "rss MiB": paced["rss_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=__doc__)
    parser.add_argument("--peer", default=shutil.which("vllm-router"), help="vllm-router's executable")
    parser.add_argument("--seconds", type=float, default=3.0, help="per closed-loop cell")
    parser.add_argument("--quick", action="store_true", help="short streams")
    options = parser.parse_args()
    columns: dict[str, dict[str, float]] = {}
    with stand_ins(0.0) as ports, stand_ins(PREFILL_S) as slow:
        variants: dict[str, Command] = {
            "tandem": tandem_command,
            "tandem, aiohttp": lambda ports, port: tandem_command(ports, port, "server.fast_path=false"),
        }
        if options.peer:
            variants["vllm-router"] = lambda ports, port: peer_command(options.peer, ports, port)
        columns["direct"] = cells(f"http://127.0.0.1:{ports['decode']}", None, options.seconds, quick=options.quick)
        for name, command in variants.items():
            print(f"measuring {name}", file=sys.stderr)
            port = free_port()
            with router(command(ports, port), port) as (url, pid):
                columns[name] = cells(url, pid, options.seconds, quick=options.quick)
            port = free_port()
            with router(command(slow, port), port) as (url, pid):
                slow_run = measure(url, pid, "--connections=1", f"--seconds={options.seconds}")
                columns[name]["ttft p50 ms"] = 1e3 * slow_run["first_byte_s"]["p50"]
    print_table(columns)


def print_table(columns: dict[str, dict[str, float]]) -> None:
    rows = list(next(reversed(columns.values())))
    print("| | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for row in rows:
        values = [columns[name].get(row) for name in columns]
        print(f"| {row} | " + " | ".join("" if value is None else _short(value) for value in values) + " |")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    main()
