"""The kernels' tests under NVIDIA's checkers, on a GPU: are all accesses inside, ordered, initialised?

    python -m benchmarks.kernels_sanitize --tool memcheck --out DIR [--deadline-s 80] [--pytest "-m gpu"] [TEST ...]

memcheck    accesses outside of an allocation or misaligned; every tensor is an allocation of its own meanwhile
racecheck   shared memory that two threads access without a barrier between
initcheck   reads of device memory that nothing has written
synccheck   barriers that not all threads reach that should

The tests (all of tests/kernels unless named, as pytest names them) are dealt to processes that run side by side, one
case of each test before a second one of any. Kernels of other libraries are not checked, but for memory. What a process
said is in DIR/TOOL-NUMBER.txt. The table says what became of the tests of each file; findings follow. The exit code is
0 if there were none and all tests passed.
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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OURS = ("_kernel", "hyper_")
"""Parts of the names of our kernels. Products of other libraries crash under the checkers of shared memory."""
NO_KERNELS = ("test_compile.py", "test_twins_")
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
FRAME = re.compile(r"(?:^|\s)={9}(?: |$)")
"""What a checker says may follow the name of the test that runs."""
NO_FINDING = re.compile(r"(COMPUTE-SANITIZER|\w+ SUMMARY: 0 |Target application returned an error|$)")
VERDICT = re.compile(r"^(tests/\S+\.py)::.* (PASSED|FAILED|ERROR)", re.MULTILINE)


def collect(tests: Sequence[str], options: Sequence[str]) -> list[str]:
    """The names of all tests that would run. The project's settings make pytest quiet, and so print nothing else."""
    command = [*PYTEST, "--collect-only", *options, *tests]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [line for line in said.splitlines() if "::" in line]


def in_turns(tests: Sequence[str]) -> list[str]:
    """A middle case of every test, then its neighbours: what a deadline cuts off are further cases of the same."""
    cases: dict[str, list[str]] = {}
    for test in tests:
        cases.setdefault(test.partition("[")[0], []).append(test)
    distance = {test: abs(2 * place - len(same) + 1) for same in cases.values() for place, test in enumerate(same)}
    return sorted(tests, key=distance.__getitem__)


def command(tool: str, tests: Sequence[str]) -> list[str]:
    checker = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", "--target-processes", "all"]
    if tool != "memcheck":
        for part in OURS:
            checker += ["--kernel-regex", f"kns={part}"]
    return [*checker, *PYTEST, "-vv", "--tb=short", *tests]


def run(tool: str, tests: Sequence[str], log: Path, deadline: float) -> str:
    """What checker and tests said until they ended or time was up."""
    environment = dict(os.environ)
    if tool in ("memcheck", "initcheck"):
        # In torch's pool a tensor's neighbour is a valid address.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(tool, tests), stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace")


def findings(said: str) -> list[str]:
    """What a checker reported, line by line, also one that was cut off."""
    lines = [line[frame.end() :].strip() for line in said.splitlines() if (frame := FRAME.search(line))]
    return [line for line in lines if not NO_FINDING.match(line)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", help="default: all files of tests/kernels")
    parser.add_argument("--tool", choices=TOOLS, default="memcheck")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--deadline-s", type=float, default=80.0)
    parser.add_argument("--pytest", default="", metavar="OPTIONS", help="to choose among the tests")
    options = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: it is part of the CUDA toolkit", file=sys.stderr)
        return 2
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    files = [str(path) for path in sorted(Path("tests/kernels").glob("test_*.py"))]
    files = [file for file in files if not Path(file).name.startswith(NO_KERNELS)]
    wanted = collect(options.tests or files, shlex.split(options.pytest))
    if not wanted:
        print("there are no such tests", file=sys.stderr)
        return 2
    hands = [hand for first in range(options.jobs) if (hand := in_turns(wanted)[first :: options.jobs])]
    with ThreadPoolExecutor(len(hands)) as pool:
        logs = [options.out / f"{options.tool}-{number}.txt" for number in range(len(hands))]
        ending = [began + options.deadline_s] * len(hands)
        said = list(pool.map(run, [options.tool] * len(hands), hands, logs, ending))
    verdicts = Counter(pair for text in said for pair in VERDICT.findall(text))
    of_file = Counter(test.partition("::")[0] for test in wanted)
    print(f"{options.tool}, {time.monotonic() - began:.0f} s\n| file | passed | failed | cut off |\n|---|---|---|---|")
    for file, count in of_file.items():
        passed, failed = verdicts[file, "PASSED"], verdicts[file, "FAILED"] + verdicts[file, "ERROR"]
        print(f"| {file} | {passed} | {failed} | {count - passed - failed} |")
    found = [line for text in said for line in findings(text)]
    print(*(found or ["nothing found"]), sep="\n")
    return 0 if not found and sum(verdicts[file, "PASSED"] for file in of_file) == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
