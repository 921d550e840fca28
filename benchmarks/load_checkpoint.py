"""How fast a rank's weights come from disk to where they are computed with, against the disk alone.

    python -m benchmarks.load_checkpoint --dir DIR [--layers 3] [--experts 64] [--device cuda|cpu] [--keep]

Writes a checkpoint of DeepSeek-V4-Flash's width (random bytes that are finite numbers) under DIR unless one is there,
and loads it twice: cold, after its pages were dropped from the machine's cache, and warm. "disk" reads the same files
cold into one buffer by 1 and by 8 threads; "copy" is a host's pinned memory to the device. Rates are of stored bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from benchmarks.gpu_rank import first_layers
from model.checkpoint import INDEX_NAME, load_weights
from model.checkpoint_writer import plan_shards
from model.config import ModelConfig
from model.inventory import TensorSpec
from model.presets import flash
from model.safetensors_file import write_safetensors
from model.transformer import Transformer

CHUNK = 8 << 20
SHARD_BYTES = 1 << 30
TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I8": torch.int8,
}  # fmt: skip


def write(directory: Path, config: ModelConfig) -> None:
    """Bytes in place of numbers: quantising random ones would take minutes."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_bytes(config.to_json())
    # Odd numbers of bytes from a random place: no two tensors are alike.
    noise = torch.randint(0, 256, (CHUNK + 4096,), dtype=torch.uint8)
    places = iter(torch.randint(0, 4096, (100_000,)).tolist())

    def stored(specs: list[TensorSpec]) -> Iterator[Tensor]:
        for spec in specs:
            if spec.dtype == "I64":
                yield torch.randint(0, config.n_routed_experts, spec.shape)
                continue
            start = next(places)
            data = noise[start : start + CHUNK].repeat(-(-spec.num_bytes // CHUNK))[: spec.num_bytes]
            if spec.dtype == "F8_E8M0":
                data = data % 8 + 118
            elif spec.dtype == "F8_E4M3":
                data = data & 0xB7
            elif spec.dtype in ("BF16", "F32"):
                data = data & 0x3D
            yield data.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)

    shards = plan_shards(config, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards):
        name = f"model-{number:05d}.safetensors"
        write_safetensors(directory / name, specs, stored(specs))
        weight_map |= {spec.name: name for spec in specs}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def drop_from_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files: list[Path], threads: int) -> None:
    """Every byte once, each thread its own stretches."""
    stretches = [(path, offset) for path in files for offset in range(0, path.stat().st_size, CHUNK)]

    def work(mine: list[tuple[Path, int]]) -> None:
        buffer = bytearray(CHUNK)
        for path, offset in mine:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                file.readinto(buffer)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [stretches[number::threads] for number in range(threads)]))


def copy_rate(device: torch.device) -> float:
    """Bytes per second."""
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(host.numel() / statistics.median(times))


def load(directory: Path, config: ModelConfig, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    model = Transformer(config, dtype=torch.bfloat16, numerics="released", device=device, packed_weights=on_gpu)
    load_weights(directory, model, progress=False)
    if on_gpu:
        torch.cuda.synchronize()


def timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    options = parser.parse_args()
    config = msgspec.structs.replace(first_layers(flash(), options.layers), n_routed_experts=options.experts)
    directory = options.dir / f"flash-{options.layers}-layers-{options.experts}-experts"
    if not (directory / INDEX_NAME).exists():
        print(f"written in {timed(lambda: write(directory, config)):.1f} s", flush=True)
    files = sorted(directory.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    device = torch.device(options.device)
    if device.type == "cuda":
        print(f"| copy, pinned | | {copy_rate(device) / 1e9:.2f} |", flush=True)

    def show(what: str, call: Callable[[], None], cold: bool) -> None:
        if cold:
            drop_from_cache(files)
        took_s = timed(call)
        print(f"| {what} | {took_s:.2f} | {size / took_s / 1e9:.2f} |", flush=True)

    print(f"{size / 1e9:.2f} GB in {len(files)} files\n| what | s | GB/s |\n|---|---|---|", flush=True)
    show("disk, 1 thread", lambda: read_all(files, 1), cold=True)
    show("disk, 8 threads", lambda: read_all(files, 8), cold=True)
    show("cache, 8 threads", lambda: read_all(files, 8), cold=False)
    # Kernels that lay weights out are compiled by the first one.
    show("load, warm, first", lambda: load(directory, config, device), cold=False)
    show("load, cold", lambda: load(directory, config, device), cold=True)
    show("load, warm", lambda: load(directory, config, device), cold=False)
    if not options.keep:
        shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
