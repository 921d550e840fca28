"""The phases of a step as a profiler sees them: a library in a profiler's place takes the names down."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from engine.config import EngineConfig
from kernels.cuda_build import find_nvcc
from runtime.requests import SamplingParams
from tests.handoff.engine_rank import Ask, RankProcess

LISTENER = """
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef void (*function)(void);

struct callbacks {
    size_t struct_size;
    int (*functions_of_module)(int module, function*** table, unsigned* size);
};

static int push(const char* name) {
    FILE* file = fopen(getenv("TANDEM_TEST_RANGES"), "a");
    fprintf(file, "%s\\n", name);
    fclose(file);
    return 0;
}

/* NVTX calls this in the library that NVTX_INJECTION64_PATH names. Table 1 holds the callbacks; of module 1, its core,
   function 9 begins a range. */
int InitializeInjectionNvtx2(const void* (*export_table)(unsigned)) {
    const struct callbacks* callbacks = export_table(1);
    function** table;
    unsigned size;
    if (!callbacks || !callbacks->functions_of_module(1, &table, &size) || size <= 9) return 0;
    *table[9] = (function)push;
    return 1;
}
"""


@pytest.mark.gpu
def test_every_step_has_ranges_for_its_phases(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library, ranges = tmp_path / "listener.c", tmp_path / "listener.so", tmp_path / "ranges"
    source.write_text(LISTENER)
    subprocess.run([find_nvcc(), "-shared", "-Xcompiler", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setenv("NVTX_INJECTION64_PATH", str(library))
    monkeypatch.setenv("TANDEM_TEST_RANGES", str(ranges))
    config = EngineConfig(model=str(tiny_checkpoint), device="cuda", num_pages=40, profiler_ranges=True)
    rank = RankProcess("standalone", config)
    try:
        rank.wait_ready(120)
        rank.ask([Ask("r", [5, 6, 7], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))])
        rank.finish(1, 60)
    finally:
        rank.stop()
    counts = Counter(ranges.read_text().split())
    assert counts["launch"] == counts["wait"] == counts["emit"] >= 6, counts
    assert counts["schedule"] >= 6, counts
