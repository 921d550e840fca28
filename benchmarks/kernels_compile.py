"""Compiles the Triton kernels for Hopper without a GPU: python -m benchmarks.kernels_compile [--only NAME,...]

Triton's interpreter runs what its compiler may refuse, so this is the other half of a CPU-only check. Every launcher is
called at DeepSeek-V4-Flash's widths with CPU tensors; instead of a launch, the kernel is compiled to machine code. A
line per variant: registers, bytes spilled to local memory, shared memory, tensor-core instructions, seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.batch_index import BatchIndex
from kernels.compressor import EntryTarget
from kernels.exchange_rows import RowFormat, unpack_rows
from kernels.gpu_indexer import select_entries_gpu
from kernels.packed_rows import PackedRows, PoolFormat
from kernels.rope import rope_angles
from kernels.sampling import Truncation
from kernels.triton_attention_inputs import attention_inputs_triton
from kernels.triton_compressor import compress_overlapping_triton, compress_pending_triton
from kernels.triton_exchange_rows import add_sums_gpu, pack_rows_gpu
from kernels.triton_expert_rows import combine_rows, quantize_rows, sort_by_expert
from kernels.triton_gate import pick_experts
from kernels.triton_index_query import index_query_triton
from kernels.triton_norm import rms_norm_triton
from kernels.triton_rotary import rotate_in_place
from kernels.triton_rows import insert_window_triton, store_rows_triton
from kernels.triton_sampling import draw_triton
from kernels.triton_sparse_attention import Division, join_parts, sparse_attention_triton
from kernels.triton_swiglu import swiglu_quantized_triton, swiglu_triton

TARGET = GPUTarget("cuda", 90, 32)
PAGE_TOKENS = 256
BF16 = torch.bfloat16


class _NoDevice:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiler:
    """Takes the place of every launch."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._run: Callable[..., Any] = JITFunction.run
        self.spilled = 0

    def install(self) -> None:
        driver.set_active(_NoDevice())
        compiler = self

        def run(function: Any, *args: Any, **options: Any) -> None:
            compiler.compile(function, args, options)

        JITFunction.run = run  # type: ignore[method-assign]

    def compile(self, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        started = time.monotonic()
        kernel = self._run(function, *args, **{**options, "warmup": True})
        if kernel.hash in self._seen:
            return
        self._seen.add(kernel.hash)
        registers, spilled = _resources(kernel.asm["cubin"])
        self.spilled += spilled
        products = len(re.findall(r"wgmma\.mma|mma\.sync", kernel.asm["ptx"]))
        print(
            f"{function.__name__:32s} {registers:4d} registers {spilled:4d} B spilled"
            f" {kernel.metadata.shared:7d} B shared {products:3d} products {time.monotonic() - started:5.1f} s",
            flush=True,
        )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return -1, 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (-1, 0)


def _index(*, decode: bool) -> BatchIndex:
    counts = torch.tensor([1, 1] if decode else [33, 5], dtype=torch.int32)
    context = torch.tensor([8191, 4000] if decode else [0, 4000], dtype=torch.int32)
    request = torch.repeat_interleave(counts).int()
    start = torch.tensor([0, *counts.cumsum(0).tolist()], dtype=torch.int32)
    within = torch.arange(int(start[-1])) - start[request]
    return BatchIndex(
        token_request_T=request,
        positions_T=within + context[request],
        query_start=start,
        context_len_B=context,
        slot_ids_B=torch.arange(2, dtype=torch.int32),
        page_table=torch.zeros(2, 128, dtype=torch.int32),
        page_tokens=PAGE_TOKENS,
        one_token_each=decode,
    )


def _pool(rows: int, width: int, form: PoolFormat) -> PackedRows:
    data_bytes, scale_bytes = {"kv_fp8": (576, 8), "key_mxfp4": (64, 4), "key_fp8": (128, 1), "bf16": (width, 0)}[form]
    plain = form == "bf16"
    data = torch.zeros(8, rows, data_bytes, dtype=BF16 if plain else torch.uint8)
    scale_dtype = torch.float32 if form == "key_fp8" else torch.uint8
    scales = None if plain else torch.zeros(8, rows, scale_bytes, dtype=scale_dtype)
    return PackedRows(format=form, width=width, rope_dim=64 if width == 512 else 0, data=data, scales=scales)


def _attention(form: PoolFormat) -> None:
    index, ring = _index(decode=True), _pool(128, 512, form)
    query, chunk = torch.zeros(2, 64, 512, dtype=BF16), ring.like(2)
    listed = torch.zeros(2, 512, dtype=torch.int32)
    sparse_attention_triton(query, chunk, ring, torch.ones(64), index, 0.04, _pool(64, 512, form), listed, 4)
    sparse_attention_triton(query, chunk, ring, torch.ones(64), index, 0.04, _pool(2, 512, form), None, 128, 8)
    parts, tops = torch.zeros(2, 5, 64, 512), torch.zeros(2, 5, 64)
    codes, scales = torch.zeros(2, 64, 512, dtype=torch.float8_e4m3fn), torch.zeros(256, 4)
    angles, division = rope_angles(index.positions_T, torch.ones(32)), Division(index.positions_T, 64, 2, 0, 128, 32)
    join_parts(parts, tops, tops, torch.ones(64), codes, scales, angles, division)


def _inputs(index: BatchIndex, form: PoolFormat) -> None:
    tokens = index.num_tokens
    angles = rope_angles(index.positions_T, torch.ones(32))
    query, row = torch.zeros(tokens, 64, 512, dtype=BF16), torch.zeros(tokens, 1536, dtype=BF16)[:, 1024:]
    ring = _pool(128, 512, form)
    _, chunk = attention_inputs_triton(query, row, torch.ones(512), angles, 1e-6, ring, index, simulate=True)
    insert_window_triton(chunk, ring, index)


def _compressors(index: BatchIndex, main: PoolFormat, key: PoolFormat) -> None:
    tokens, frequencies = index.num_tokens, torch.ones(32)
    for width, pool in ((512, _pool(64, 512, main)), (128, _pool(64, 128, key))):
        value, score = torch.zeros(tokens, 2560)[:, : 4 * width].split(2 * width, -1)
        state = (torch.zeros(2, 4, 2, 2 * width), torch.zeros(2, 4, 2, width))
        target = EntryTarget(torch.ones(width), frequencies, pool, 1e-6, True)
        compress_overlapping_triton(value, score, torch.zeros(4, 2 * width), *state, index, target, BF16)
    value, score = torch.zeros(tokens, 1024).split(512, -1)
    target = EntryTarget(torch.ones(512), frequencies, _pool(2, 512, main), 1e-6, True)
    compress_pending_triton(value, score, torch.zeros(128, 512), torch.zeros(2, 3, 512), index, target, BF16)


def _indexer(index: BatchIndex, key: PoolFormat) -> None:
    tokens, keys = index.num_tokens, _pool(64, 128, key)
    query = torch.zeros(tokens, 64, 128, dtype=BF16)
    query = index_query_triton(query, rope_angles(index.positions_T, torch.ones(32)), keys, simulate=True)
    select_entries_gpu(query, torch.zeros(tokens, 64), keys, index, 4, 512)


def _small() -> None:
    rows = torch.zeros(2, 4096, dtype=BF16)
    rms_norm_triton(rows, torch.ones(4096), 1e-6)
    rms_norm_triton(rows[:, :1024], torch.ones(1024), 1e-6)
    swiglu_triton(rows[:, :2048], rows[:, 2048:], 10.0, BF16)
    swiglu_quantized_triton(rows[:, :2048], rows[:, 2048:], 10.0)
    rotate_in_place(torch.zeros(2, 64, 512, dtype=BF16), torch.ones(2, 32), torch.ones(2, 32), inverse=True)
    pick_experts(torch.zeros(2, 256), 6, 1.5, bias_E=torch.zeros(256))
    table, ids = torch.zeros(9, 6, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    pick_experts(torch.zeros(2, 256), 6, 1.5, given_VK=table, token_ids_T=ids, real_T=ids == 0, nowhere=256)
    page = torch.zeros(2, dtype=torch.int64)
    store_rows_triton(_pool(4, 512, "kv_fp8"), page, page, torch.zeros(2, 512, dtype=BF16), simulate=True)


def _exchange() -> None:
    layout = RowFormat(4096, 6, BF16, quantised=True)
    tokens, routing = torch.zeros(2, 4096, dtype=BF16), torch.zeros(2, 6, dtype=torch.int64)
    arrived = unpack_rows(pack_rows_gpu(tokens, routing, routing.float(), layout, 4, 256), layout)
    add_sums_gpu(torch.empty(4, 4, tokens.shape[1]), tokens, torch.empty_like(tokens))
    for many in (False, True):
        rows = sort_by_expert(routing.repeat(256, 1) if many else routing, 64, 64)
    for x, weights in ((tokens, routing.float()), (arrived[0], arrived[2])):
        quantize_rows(x, weights, rows)
    combine_rows(torch.zeros(12, 4096, dtype=BF16), rows)
    combine_rows(torch.zeros(12, 4096, dtype=BF16), rows, tokens)


def _sampling() -> None:
    logits, best, rows = torch.zeros(2, 129_280), torch.zeros(2), torch.arange(2)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    draw_triton(logits, best, rows, half.float(), half, half.float(), Truncation(rows, rows + 20, half, 21))
    draw_triton(logits, best, rows, half.float(), half, None, None)


def _layers(main: PoolFormat, key: PoolFormat, *, decode: bool) -> None:
    index = _index(decode=decode)
    _inputs(index, main)
    _compressors(index, main, key)
    _indexer(index, key)


SETS: dict[str, Callable[[], None]] = {
    "small": _small,
    "decode": partial(_layers, "kv_fp8", "key_mxfp4", decode=True),
    "chunk": partial(_layers, "kv_fp8", "key_mxfp4", decode=False),
    "fp8-keys": partial(_layers, "kv_fp8", "key_fp8", decode=False),
    "bf16": partial(_layers, "bf16", "bf16", decode=True),
    "exchange": _exchange,
    "sampling": _sampling,
    "attention": partial(_attention, "kv_fp8"),
    "attention-bf16": partial(_attention, "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(SETS), help=f"comma-separated, of {', '.join(SETS)}")
    names = parser.parse_args().only.split(",")
    unknown = set(names) - set(SETS)
    if unknown:
        parser.error(f"no set named {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    if torch.cuda.is_available():
        sys.exit("this compiles with tensors on the CPU; with a GPU at hand run the tests instead")
    compiler = Compiler()
    compiler.install()
    print(f"triton {triton.__version__}, sm_{TARGET.arch}")
    for name in names:
        SETS[name]()
    print(f"{compiler.spilled} B spilled in all")


if __name__ == "__main__":
    main()
