"""Every kernel under NVIDIA's checkers, on a GPU: are all accesses inside, ordered, initialised, all barriers met?

    python -m benchmarks.kernels_sanitize --out DIR [--tool memcheck,racecheck] [--kernel NAME] [--checker PATH]

memcheck    accesses outside of an allocation or misaligned; every tensor is an allocation of its own meanwhile
racecheck   shared memory that two threads access without a barrier between
initcheck   reads of device memory that nothing has written; every tensor is an allocation of its own here too. What it
            says of other libraries' kernels is left out: it does not see what the copy engine stored for them to read
synccheck   barriers and products of tensor cores that not all threads reach that should

What launches the kernels are their own tests, on small shapes, so that results are compared as well. PARTS says which
tests launch the kernels of which sources. Parts run side by side, each in a process of its own: DIR/TOOL-PART.log is
what the checker said, DIR/TOOL-PART.txt what the tests did. The table has a row for each kernel and tool; what was
reported follows, equal reports once. The exit code is 0 if nothing was reported and every test passed.

Checkers know barriers in shared memory and copies that arrive at them better with every release: a newer one than the
toolkit's, given by --checker, reports less that is none.
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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "kernels"
TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")
CUDA_KERNEL = re.compile(r"__global__([^{;]*)\{")
TRITON_KERNEL = re.compile(r"@triton\.jit(?:\([^)]*\))?\s+def (_\w+_kernel)\(")
BARRIERS = 64
"""Of a CTA, at most. Checkers count declarations, of which there are none where shared memory is laid out by hand."""
HEAD = re.compile(r"^=+ (?=\S)")
LAUNCH = re.compile(r"Launch #\d+$")
"""Of a launch that was checked: behind another's number it says why it was not."""
NO_REPORT = re.compile(r"COMPUTE-SANITIZER|\w+ SUMMARY: |Target application returned an error|Launch #")
CHANGING = re.compile(r"by thread.*|in block.*|Address 0x\w+.*|address 0x\w+.*|\[\d+ hazards?\]|#\d+|and is .*")
VERDICT = re.compile(r"^.*(?:passed|failed|errors?).* in [\d.]+s.*$", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """Kernels that are checked together, and the tests that launch them."""

    sources: tuple[str, ...]
    """Below kernels/, without their suffixes."""
    tests: tuple[str, ...]
    """Files below tests/kernels/, without test_ and .py."""
    chosen: str = ""
    """What pytest's -k chooses from them."""
    only: str = ""
    """Regular expression of the kernels, if not all of the sources."""
    large: bool = False
    """Racecheck, which follows every access on the CPU, looks at the first cluster (or CTA) of each launch alone."""

    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels."""
        names = [name for source in self.sources for name in kernels_of(source)]
        return tuple(name for name in names if re.search(self.only, name))


PARTS = {
    "attention-steps": Part(
        ("cuda/sparse_attention", "triton_sparse_attention"),
        ("sparse_attention",),
        "(hopper_kernels_match and decode and not widened) or joined",
        "^(sparse_attention|_join)_kernel",
    ),
    "attention-any-scale": Part(
        ("cuda/sparse_attention", "cuda/chunk_attention"), ("sparse_attention",), "any_scale", large=True
    ),
    "attention-chunks": Part(
        ("cuda/chunk_attention",), ("sparse_attention",), "hopper_kernels_match and widened", large=True
    ),
    "attention-triton": Part(
        ("triton_sparse_attention",),
        ("sparse_attention",),
        "matches_the_reference and not hopper or without or layer",
    ),
    "experts-few": Part(
        ("cuda/experts_few",),
        ("experts",),
        "hopper_experts_match and not 128 and (1-2-8-2-4 or 40-2-8-4-3 or 65-3-5-0-5)",
        large=True,
    ),
    "experts-many": Part(
        ("cuda/experts_many",),
        ("experts",),
        "hopper_experts_match and 128 and (1-2-8-2-4 or 65-3-5-0-5 or 900-2-3-0-3)",
        large=True,
    ),
    "experts-triton": Part(
        ("triton_experts", "triton_expert_rows"),
        ("experts",),
        "not hopper and not (2731 or block_rows_cover or promised)",
    ),
    "exchange": Part(("triton_exchange_rows",), ("exchange_rows",)),
    "fp8-tiles": Part(
        ("cuda/fp8_gemm",),
        ("fp8_gemm",),
        "every_tile_of_the_hopper and (1-512-128 or 65-512-384 or 130-1536-1920)",
        large=True,
    ),
    "fp8-heads": Part(("cuda/fp8_gemm",), ("fp8_gemm",), "heads_are_finished and (1-512 or 63-1024)"),
    "fp8-triton": Part(
        ("triton_fp8_gemm", "triton_quantize", "triton_rotary"),
        ("fp8_gemm", "grouped_output", "rotary", "elementwise"),
        "not hopper and not heads and not changes_no_bit",
    ),
    "seam": Part(
        ("cuda/hyper_seam",),
        ("hyper_connection",),
        "(hopper_matches_post and 1024) or hopper_matches_pre[1] or hopper_matches_pre[65]",
    ),
    "seam-divisions": Part(("cuda/hyper_seam",), ("hyper_connection",), "any_others", large=True),
    "hyper-triton": Part(("triton_hyper_connection",), ("hyper_connection",), "not hopper and not any_others"),
    "index-query": Part(
        ("cuda/index_query", "cuda/top_entries"),
        ("index_hopper",),
        "packed_queries or (exact_and_ascend and not 2047)",
    ),
    "index-scores": Part(
        ("cuda/index_scores",),
        ("index_hopper",),
        "(twin_and_have_the_same_bits and requests2) or neighbours",
    ),
    "index-triton": Part(
        ("triton_index_query", "triton_index_scores", "triton_top_entries"),
        ("index_kernels",),
        "not released_size and not long_rows",
    ),
    "wide": Part(("cuda/wide_gemm",), ("wide_linear",), "among_others[40"),
    "inputs": Part(("triton_attention_inputs", "triton_rows"), ("attention_inputs", "rows"), "not released_size"),
    "compressors": Part(("triton_compressor",), ("compressor_kernels",), "not released_size"),
    "elementwise": Part(
        ("triton_norm", "triton_swiglu", "triton_gate", "triton_quantize"),
        ("elementwise", "gate", "launchers"),
    ),
    "sampling": Part(("triton_sampling",), ("sampling",), "not released_vocabulary"),
}


def kernels_of(source: str) -> list[str]:
    """Names of the kernels that a source of kernels/ declares."""
    path = KERNELS / f"{source}.py"
    if path.exists():
        return TRITON_KERNEL.findall(path.read_text())
    declared = CUDA_KERNEL.findall((KERNELS / f"{source}.cu").read_text())
    return [re.findall(r"\b([a-z]\w*)\(", signature)[0] for signature in declared]


@dataclass
class Outcome:
    """What became of one part under one tool."""

    tool: str
    part: str
    launches: Counter[str] = field(default_factory=Counter)
    reports: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(kernel or "", text) of each."""
    tests: str = "cut off"


def options_of(tool: str, part: Part, known: str) -> list[str]:
    """What the checker is told. `known`: its own help, for older ones know less."""
    options = ["--tool", tool, "--print-limit", "0", "--show-backtrace", "no"]
    if tool != "initcheck":  # which must see the writes of all
        options += [word for name in part.kernels() for word in ("--kernel-name", f"kns={name}")]
    if tool in ("racecheck", "synccheck"):
        options += ["--num-cuda-barriers", str(BARRIERS)]
    wanted = ["--dump-kernel-launches", "--racecheck-num-workers=2"]
    if part.large and tool == "racecheck":
        wanted.append("--racecheck-filter-cluster-id=0")
    return options + [option for option in wanted if option.partition("=")[0] in known]


def run(checker: str, known: str, extra: Sequence[str], out: Path, deadline: float, job: tuple[str, str]) -> Outcome:
    """One part under one tool, until it ends or time is up."""
    tool, name = job
    part = PARTS[name]
    log, tests = out / f"{tool}-{name}.log", out / f"{tool}-{name}.txt"
    files = [f"tests/kernels/test_{test}.py" for test in part.tests]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "--timeout=0", *files]
    command = [checker, *options_of(tool, part, known), *extra, "--log-file", str(log)]
    command += [*pytest, *(("-k", part.chosen) if part.chosen else ())]
    environment = dict(os.environ)
    if tool in ("memcheck", "initcheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # in torch's pool a tensor's neighbour is a valid address
    left = deadline - time.monotonic()
    with tests.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome = Outcome(tool, name)
    if log.exists():
        read_log(log.read_text(errors="replace"), part.kernels(), outcome)
    if ended := VERDICT.findall(tests.read_text(errors="replace")):
        outcome.tests = ended[-1]
    return outcome


def read_log(said: str, kernels: Iterable[str], outcome: Outcome) -> None:
    """Launches and reports. A report is a line that is not indented, and the indented ones after it."""
    records: list[list[str]] = []
    for line in said.splitlines():
        if HEAD.match(line):
            records.append([HEAD.sub("", line)])
        elif records and line.strip("= "):
            records[-1].append(line.lstrip("=").strip())
    for head, *rest in records:
        if LAUNCH.match(head):
            outcome.launches.update(name for name in kernels if any(is_launch_of(name, line) for line in rest))
        elif not NO_REPORT.match(head):
            lines = (CHANGING.sub("", line).strip() for line in (head, *rest))
            text = "\n    ".join(line for line in lines if line)
            name = next((kernel for kernel in kernels if re.search(rf"\b{kernel}\b", text)), "")
            if name or outcome.tool != "initcheck":
                outcome.reports[name, text] += 1


def is_launch_of(kernel: str, line: str) -> bool:
    """Names are mangled there; Triton's are plain."""
    return line == f"Kernel: {kernel}" or (line.startswith("Kernel: _Z") and f"{len(kernel)}{kernel}" in line)


def table(outcomes: Sequence[Outcome]) -> Iterable[str]:
    """A row for each tool and kernel."""
    yield "| tool | kernel | launches | errors | warnings |\n|---|---|---|---|---|"
    for tool in dict.fromkeys(outcome.tool for outcome in outcomes):
        of_tool = [outcome for outcome in outcomes if outcome.tool == tool]
        reports = {report for outcome in of_tool for report in outcome.reports}
        for name in dict.fromkeys(name for outcome in of_tool for name in PARTS[outcome.part].kernels()):
            launches = sum(outcome.launches[name] for outcome in of_tool)
            of_kernel = [text for kernel, text in reports if kernel == name]
            warnings = sum(text.startswith("Warning") for text in of_kernel)
            yield f"| {tool} | {name} | {launches} | {len(of_kernel) - warnings} | {warnings} |"


def shortcomings(outcome: Outcome, known: str) -> str:
    """What of a part was not checked; nothing if all was."""
    found = []
    if not re.match(r"\d+ passed", outcome.tests) or re.search("failed|error", outcome.tests):
        found.append(outcome.tests)
    if "--dump-kernel-launches" in known:
        found += [f"{name} was not launched" for name in PARTS[outcome.part].kernels() if not outcome.launches[name]]
    return "; ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tool", default=",".join(TOOLS))
    parser.add_argument("--kernel", default="", help="only parts with a kernel of which this is a part of the name")
    parser.add_argument("--part", default="", help="only these parts, by commas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checker", default="compute-sanitizer")
    parser.add_argument("--options", default="", help="more of the checker's own")
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--deadline-s", type=float, default=300.0)
    options = parser.parse_args()
    checker = shutil.which(options.checker)
    if checker is None:
        print("compute-sanitizer is not installed: it is part of the CUDA toolkit", file=sys.stderr)
        return 2
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    known = subprocess.run([checker, "--help"], capture_output=True, text=True, check=True).stdout
    parts = options.part.split(",") if options.part else list(PARTS)
    parts = [name for name in parts if any(options.kernel in kernel for kernel in PARTS[name].kernels())]
    jobs = [(tool, name) for tool in options.tool.split(",") for name in parts]
    check = partial(run, checker, known, shlex.split(options.options), options.out, began + options.deadline_s)
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(check, jobs))
    print(f"{checker}, {time.monotonic() - began:.0f} s", *table(outcomes), sep="\n")
    missing = [(outcome, missed) for outcome in outcomes if (missed := shortcomings(outcome, known))]
    for outcome, missed in missing:
        print(f"{outcome.tool}, {outcome.part}: {missed}")
    reports: dict[tuple[str, str, str], int] = Counter()
    for outcome in outcomes:
        for (kernel, text), count in outcome.reports.items():
            reports[outcome.tool, kernel, text] += count
    for (tool, kernel, text), count in reports.items():
        print(f"{tool}, {kernel or 'no kernel of ours'}, {count} times: {text}")
    return 1 if missing or reports else 0


if __name__ == "__main__":
    sys.exit(main())
