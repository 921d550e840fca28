"""Times the GPU kernels at DeepSeek-V4-Flash's sizes: python -m benchmarks.kernels [--only experts,gemm] [--out FILE]

Every line states microseconds, GB/s or TFLOP/s, the bound from the ceilings measured in this run, and the best peer.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from benchmarks.kernels_timing import Table, measure_ceilings

BENCHES = {
    "experts": ("benchmarks.kernels_experts", "run"),
    "attention": ("benchmarks.kernels_attention", "run"),
    "elementwise": ("benchmarks.kernels_elementwise", "run"),
    "state": ("benchmarks.kernels_state", "run"),
    "gemm": ("benchmarks.kernels_dense", "run_gemm"),
    "hyper": ("benchmarks.kernels_between", "run_hyper"),
    "wide": ("benchmarks.kernels_between", "run_wide"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(BENCHES)}")
    parser.add_argument("--out", type=Path, help="write the tables here, as markdown")
    parser.add_argument("--quick", action="store_true", help="leave out the slow comparisons")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(BENCHES)
    unknown = set(names) - set(BENCHES)
    if unknown:
        parser.error(f"no bench named {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    if not torch.cuda.is_available():
        parser.error("these benches need a CUDA device")
    torch.manual_seed(0)
    table = Table(measure_ceilings())
    print(table.ceilings.describe(), flush=True)
    for name in names:
        module, function = BENCHES[name]
        try:
            getattr(importlib.import_module(module), function)(table, arguments.quick)
        except Exception as error:
            table.failed(name, error)
        torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.write_text(table.markdown())


if __name__ == "__main__":
    main()
