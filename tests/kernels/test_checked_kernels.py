"""The run under NVIDIA's checkers knows every kernel there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernels_sanitize import KERNELS, PARTS, Outcome, kernels_of, read_log

SOURCES = [
    *(f"cuda/{path.stem}" for path in sorted((KERNELS / "cuda").glob("*.cu"))),
    *(path.stem for path in sorted(KERNELS.glob("triton_*.py"))),
]


def test_every_kernel_belongs_to_a_part():
    checked = {kernel for part in PARTS.values() for kernel in part.kernels()}
    assert {kernel for source in SOURCES for kernel in kernels_of(source)} <= checked
    assert {source for part in PARTS.values() for source in part.sources} <= set(SOURCES)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_what_a_part_runs_exists(part):
    assert part.kernels()
    assert all(Path(__file__).with_name(f"test_{name}.py").exists() for name in part.tests)


@pytest.mark.parametrize(
    ("source", "kernels"),
    [
        ("cuda/top_entries", ["top_kernel"]),
        ("cuda/chunk_attention", ["widen_kernel", "chunk_attention_kernel"]),
        ("triton_sampling", ["_keep_kernel", "_draw_kernel"]),
        ("triton_common", []),
    ],
)
def test_kernels_are_found_in_their_sources(source, kernels):
    assert kernels_of(source) == kernels


SAID = """========= COMPUTE-SANITIZER
========= Launch #1 (filtered: not in include list)
=========   Kernel: _ZN2at6native10few_kernelEv
=========   Grid:   (1, 1, 1)
========= Launch #2
=========   Kernel: _ZN46_GLOBAL__N__c926e376_15_experts_few_cu_8cbe1ec418experts_few_kernelILi8ELb1EEEv14CUtensorMap_st
=========   Grid:   (8, 3, 4)
========= Launch #3
=========   Kernel: _scores_kernel
========= Error: Race reported between Write access at void <unnamed>::few_kernel<(int)2>(<unnamed>::Arguments)+0x6240
=========     and Read access at void <unnamed>::few_kernel<(int)2>(<unnamed>::Arguments)+0x8120 [16 hazards]
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at _scores_kernel+0x1230 in scores.py:105
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f05a4000010
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at _scores_kernel+0x1230 in scores.py:105
=========     by thread (4,0,0) in block (1,0,0)
=========     Address 0x7f05a4000014
=========
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""


def test_what_a_checker_said_is_counted_by_kernel():
    outcome = Outcome("racecheck", "some")
    read_log(SAID, ("few_kernel", "experts_few_kernel", "_scores_kernel"), outcome)
    assert outcome.launches == {"experts_few_kernel": 1, "_scores_kernel": 1}
    assert [(kernel, text.splitlines()[0][:13], count) for (kernel, text), count in outcome.reports.items()] == [
        ("few_kernel", "Error: Race r", 1),
        ("_scores_kernel", "Uninitialized", 2),
    ]
