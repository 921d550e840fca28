"""The kernels' tests under NVIDIA's checkers, on a GPU: are all accesses inside, ordered, initialised?

    python -m benchmarks.kernels_sanitize --tool memcheck --out DIR [--deadline-s 80] [--pytest "-m gpu"] [TEST ...]

memcheck    accesses outside of an allocation or misaligned; every tensor is an allocation of its own meanwhile
racecheck   shared memory that two threads access without a barrier between
initcheck   reads of device memory that nothing has written
synccheck   barriers that not all threads reach that should

Tests run side by side, a process for each TEST: a file, FILE::TEST, or FILE::TEST[CASE]; all files of tests/kernels
unless named. Kernels of other libraries are not checked, but for memory. What a process said is in DIR; a table of
findings follows, and the exit code is 0 if there were none and every process ended by itself.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NOT_OURS = ("at6native", "at::native", "cutlass", "cublas", "nvjet", "splitKreduce", "cub::", "3cub")
"""Parts of the names of other libraries' kernels."""
NO_KERNELS = ("test_compile.py", "test_twins_")
FOUND = 86
"""Exit code of a checker that found something."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of one process."""

    test: str
    exit_code: int | None
    """None: it was still running at the deadline."""
    took_s: float
    passed: int
    failed: int
    errors: int
    """That the checker counted."""

    @property
    def clean(self) -> bool:
        return self.exit_code == 0 and not self.errors


def command(tool: str, test: str, options: list[str]) -> list[str]:
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    checker += ["--target-processes", "all"]
    if tool != "memcheck":
        for part in NOT_OURS:
            checker += ["--kernel-regex-exclude", f"kns={part}"]
    return [*checker, sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", *options, test]


def run(tool: str, test: str, options: list[str], out: Path, deadline: float) -> Outcome:
    """It may have waited for a worker until nothing of the deadline is left."""
    began = time.monotonic()
    name = re.sub(r"\W+", "-", test.removeprefix("tests/kernels/"))
    log = out / f"{tool}-{name.strip('-')}.txt"
    environment = dict(os.environ)
    if tool in ("memcheck", "initcheck"):
        # In torch's pool a tensor's neighbour is a valid address.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    code: int | None = None
    with log.open("wb") as stream:
        call = command(tool, test, options)
        process = subprocess.Popen(
            call, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcome(test, code, time.monotonic() - began, log.read_text(errors="replace"))


def outcome(test: str, code: int | None, took_s: float, text: str) -> Outcome:
    summaries = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    hazards = [int(count) for count in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    return Outcome(
        test=test,
        exit_code=code,
        took_s=took_s,
        passed=text.count(" PASSED "),
        failed=text.count(" FAILED "),
        errors=sum(summaries) + sum(hazards),
    )


def row(result: Outcome) -> str:
    ended = "cut off" if result.exit_code is None else f"exit {result.exit_code}"
    return f"| {result.test} | {result.passed} | {result.failed} | {result.errors} | {ended} | {result.took_s:.1f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", help="default: all files of tests/kernels")
    parser.add_argument("--tool", choices=TOOLS, default="memcheck")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--deadline-s", type=float, default=80.0)
    parser.add_argument("--pytest", default="", metavar="OPTIONS", help="for every process")
    options = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: it is part of the CUDA toolkit", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    tests = options.tests or [
        str(path) for path in sorted(Path("tests/kernels").glob("test_*.py")) if not path.name.startswith(NO_KERNELS)
    ]
    deadline = time.monotonic() + options.deadline_s
    print(f"{options.tool}\n| test | passed | failed | errors | | s |\n|---|---|---|---|---|---|", flush=True)
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        extra = shlex.split(options.pytest)
        running = [pool.submit(run, options.tool, test, extra, options.out, deadline) for test in tests]
        for future in running:
            results.append(future.result())
            print(row(results[-1]), flush=True)
    return 0 if all(result.clean for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
