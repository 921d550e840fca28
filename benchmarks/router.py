"""What the router costs, and vllm-router beside it if it is installed: same nodes, same load, same minutes.

    python -m benchmarks.router [--peer PATH_TO_VLLM_ROUTER] [--seconds 2] [--repeats 3]

Nodes, router and load generator are processes on one machine and share its cores, so requests per second say little by
themselves; the routers are measured in turns and the best of several rounds is shown. CPU time per request and per
event is taken from the router process's own clock and is the firmest figure. The nodes are
`benchmarks.router_stand_ins`, the load `benchmarks.router_load`; docs/router.md explains the rows.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.ports import free_port

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


Figures = dict[str, float]
Cell = Callable[[str, int | None, float], Figures]


def one_at_a_time(url: str, pid: int | None, seconds: float) -> Figures:
    run = measure(url, pid, "--connections=1", f"--seconds={seconds}")
    return {"1: p50 us": 1e6 * run["latency_s"]["p50"], "1: p99 us": 1e6 * run["latency_s"]["p99"]}


def many_small(url: str, pid: int | None, seconds: float) -> Figures:
    run = measure(url, pid, "--connections=64", f"--seconds={seconds}")
    return {
        "64: req/s": run["requests"] / run["seconds"],
        "64: cpu us/req": 1e6 * run["cpu_s"] / run["requests"],
        "64: p99 ms": 1e3 * run["latency_s"]["p99"],
    }


def long_prompts(url: str, pid: int | None, seconds: float) -> Figures:
    run = measure(url, pid, "--connections=16", f"--seconds={seconds}", "--body-bytes=32768")
    return {
        "32K: req/s": run["requests"] / run["seconds"],
        "32K: cpu us/req": 1e6 * run["cpu_s"] / run["requests"],
    }


def bursts(url: str, pid: int | None, seconds: float) -> Figures:
    run = measure(url, pid, "--connections=64", f"--stream={int(100 * seconds)},0")
    return {
        "burst: events/s": run["events"] / run["seconds"],
        "burst: cpu us/event": 1e6 * run["cpu_s"] / run["events"],
    }


def paced(url: str, pid: int | None, seconds: float) -> Figures:
    run = measure(url, pid, "--connections=512", f"--stream={int(50 * seconds)},20000")
    return {
        "512: cpu us/event": 1e6 * run["cpu_s"] / run["events"],
        "512: delay p50 ms": 1e3 * run["delay_s"]["p50"],
        "512: delay p99 ms": 1e3 * run["delay_s"]["p99"],
        "512: first byte p50 ms": 1e3 * run["first_byte_s"]["p50"],
        "rss MiB": run["rss_mib"],
    }


def time_to_first_token(url: str, pid: int | None, seconds: float) -> Figures:
    run = measure(url, pid, "--connections=1", f"--seconds={seconds}")
    return {f"first byte after {1e3 * PREFILL_S:.0f} ms prefill, ms": 1e3 * run["first_byte_s"]["p50"]}


CELLS: tuple[Cell, ...] = (one_at_a_time, many_small, long_prompts, bursts, paced)
ALL_CELLS = (*CELLS, time_to_first_token)


def best(figures: list[Figures]) -> Figures:
    """The least disturbed value of each: the highest rate, the lowest cost or delay."""
    return {name: (max if name.endswith("/s") else min)(run[name] for run in figures) for name in figures[0]}


def installed_peer() -> str | None:
    """In this environment (requirements/test.txt has it), or on the path."""
    here = Path(sys.executable).with_name("vllm-router")
    return str(here) if here.exists() else shutil.which("vllm-router")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=__doc__)
    parser.add_argument("--peer", default=installed_peer(), help="vllm-router's executable; '' for none")
    parser.add_argument("--seconds", type=float, default=2.0, help="per cell and router")
    parser.add_argument("--cells", nargs="*", choices=[cell.__name__ for cell in ALL_CELLS], help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the best of each figure is shown")
    options = parser.parse_args()
    commands: dict[str, Command] = {
        "tandem": tandem_command,
        "tandem, aiohttp": lambda ports, port: tandem_command(ports, port, "server.fast_path=false"),
    }
    if options.peer:
        commands["vllm-router"] = lambda ports, port: peer_command(options.peer, ports, port)
    columns: dict[str, Figures] = {}
    for prefill_s, all_cells in ((0.0, CELLS), (PREFILL_S, (time_to_first_token,))):
        cells = [cell for cell in all_cells if not options.cells or cell.__name__ in options.cells]
        if not cells:
            continue
        with contextlib.ExitStack() as stack:
            ports = stack.enter_context(stand_ins(prefill_s))
            targets: dict[str, tuple[str, int | None]] = {}
            if not prefill_s:
                targets["direct"] = (f"http://127.0.0.1:{ports['decode']}", None)
            for name, command in commands.items():
                port = free_port()
                targets[name] = stack.enter_context(router(command(ports, port), port))
            for cell in cells:
                print(f"measuring {cell.__name__}", file=sys.stderr)
                runs: dict[str, list[Figures]] = {name: [] for name in targets}
                # In turns, so that whatever else the machine does meets all of them alike.
                for _ in range(options.repeats):
                    for name, (url, pid) in targets.items():
                        runs[name].append(cell(url, pid, options.seconds))
                for name, figures in runs.items():
                    columns.setdefault(name, {}).update(best(figures))
    for figure in [name for name in columns.get("direct", ()) if "cpu" in name or name.startswith("rss")]:
        del columns["direct"][figure]
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
