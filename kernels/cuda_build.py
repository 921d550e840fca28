"""Compiles kernels/cuda/*.cu with nvcc at first use, caches by source hash, and loads the result with ctypes.

Sources expose plain C functions that take raw pointers and a stream and return a cudaError_t, so a library does not
depend on torch's ABI. The cache lives in $TANDEM_CACHE_DIR, else in ~/.cache/tandem. A machine without nvcc or without
a Hopper GPU gets CudaUnavailable, upon which launchers use their Triton kernel.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent / "cuda"
ARCHITECTURE = ("-gencode=arch=compute_90a,code=sm_90a",)
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
BUILD_TIMEOUT_S = 600.0


class CudaUnavailable(Exception):
    """No CUDA C++ kernel can run here; the message says why."""


def _cache_dir() -> Path:
    root = os.environ.get("TANDEM_CACHE_DIR")
    return Path(root) if root else Path.home() / ".cache" / "tandem"


def find_nvcc() -> str:
    """Path of nvcc. Raises CudaUnavailable."""
    for candidate in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and Path(candidate).exists():
            return candidate
    raise CudaUnavailable("nvcc was not found on PATH or in /usr/local/cuda")


def _sources(name: str) -> list[Path]:
    """The file and the headers of ours that it includes, each once, in a fixed order."""
    found: list[Path] = []
    waiting = [SOURCE_DIR / name]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.append(source)
            waiting.extend(SOURCE_DIR / header for header in re.findall(r'#include "([^"]+)"', source.read_text()))
    return sorted(found)


def build(name: str) -> Path:
    """Path of the shared library of kernels/cuda/<name>.cu, compiled if the cache lacks it. Raises CudaUnavailable."""
    nvcc = find_nvcc()
    digest = hashlib.sha256(" ".join((*ARCHITECTURE, *FLAGS)).encode())
    for source in _sources(f"{name}.cu"):
        digest.update(source.read_bytes())
    target = _cache_dir() / f"{name}-{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        command = [nvcc, *ARCHITECTURE, *FLAGS, str(SOURCE_DIR / f"{name}.cu"), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        if result.returncode:
            raise CudaUnavailable(f"{name}.cu did not compile: {result.stderr[-2000:]}")
        output.replace(target)  # atomic: processes that build at once leave one whole file
    return target


@lru_cache(maxsize=16)
def load(name: str) -> ctypes.CDLL:
    """The library of kernels/cuda/<name>.cu on a Hopper GPU. Raises CudaUnavailable."""
    if not torch.cuda.is_available():
        raise CudaUnavailable("no CUDA device")
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        raise CudaUnavailable(f"{name}.cu is for compute capability 9.x, this GPU has {capability[0]}.{capability[1]}")
    return ctypes.CDLL(str(build(name)))


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Device pointer of a tensor, null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def stream(device: torch.device) -> ctypes.c_void_p:
    """The stream that torch launches on."""
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


def check(error: int, what: str) -> None:
    """Raises RuntimeError for a cudaError_t other than success."""
    if error:
        raise RuntimeError(f"{what}: CUDA error {error}")
