"""Triton's compiler takes the kernels that its interpreter ran."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_state_kernels_compile_for_hopper_without_spilling(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.kernels_compile", "--only", "decode"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(re.findall(r"registers", result.stdout)) >= 7
    assert result.stdout.splitlines()[-1] == "0 B spilled in all"
