"""Reading and writing one safetensors file: a JSON header with dtype, shape and byte range of every tensor, then bytes.

The header is parsed and checked against the file's size before any data is touched, and tensors are views of the mapped
file, so that reading a few experts out of a shard costs only their bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.inventory import DTYPE_BYTES, TensorSpec
from runtime.errors import CheckpointError

_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I8": torch.int8,
}
_MAX_HEADER_BYTES = 100 << 20


class SafetensorsFile:
    """One file, header validated. Raises CheckpointError naming the file and the tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                header_bytes = int.from_bytes(prefix, "little")
                if len(prefix) < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                    raise CheckpointError(f"{path}: truncated: {size} bytes, header of {header_bytes}")
                header = json.loads(file.read(header_bytes))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: header is not JSON: {error}") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: header is not a JSON object")
        header.pop("__metadata__", None)
        self._data_start = 8 + header_bytes
        self.specs: dict[str, TensorSpec] = {}
        self._ranges: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            self._add(name, entry, size - self._data_start)

    def _add(self, name: str, entry: object, data_bytes: int) -> None:
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
            sane = all(type(n) is int and n >= 0 for n in (*shape, start, end)) and isinstance(dtype, str)
        except (TypeError, KeyError, ValueError):
            sane = False
        if not sane:
            raise CheckpointError(f"{self.path}: {name}: unreadable header entry {entry!r}")
        spec = TensorSpec(name, shape, dtype)
        if dtype in DTYPE_BYTES and end - start != spec.num_bytes:
            raise CheckpointError(
                f"{self.path}: {name}: {end - start} bytes for {dtype} {list(shape)}, which takes {spec.num_bytes}"
            )
        if end > data_bytes:
            raise CheckpointError(f"{self.path}: truncated: {name} ends at byte {end} of {data_bytes}")
        self.specs[name], self._ranges[name] = spec, (start, end)

    def map(self) -> MappedTensors:
        """Maps the file for reading."""
        return MappedTensors(self.path, self.specs, self._ranges, self._data_start)


class MappedTensors:
    """Tensors of one mapped file; the mapping lives as long as this object or a tensor taken from it."""

    def __init__(
        self, path: Path, specs: dict[str, TensorSpec], ranges: dict[str, tuple[int, int]], data_start: int
    ) -> None:
        self._specs, self._ranges, self._data_start = specs, ranges, data_start
        with path.open("rb") as file:
            # A private mapping: torch refuses to wrap read-only memory without a warning. Nothing writes to it.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __getitem__(self, name: str) -> Tensor:
        spec, (start, _) = self._specs[name], self._ranges[name]
        dtype = _DTYPES[spec.dtype]
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=dtype)
        # Offsets need not be multiples of the element size, and frombuffer accepts any.
        flat = torch.frombuffer(self._memory, dtype=dtype, count=math.prod(spec.shape), offset=self._data_start + start)
        return flat.view(spec.shape)


def write_safetensors(path: Path, specs: Iterable[TensorSpec], tensors: Iterator[Tensor]) -> None:
    """Writes `tensors`, one per spec in order, to `path`; the file appears under its name only when complete."""
    specs = list(specs)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tuple(tensor.shape) != spec.shape or tensor.dtype != _DTYPES[spec.dtype]:
                raise ValueError(f"{spec.name}: {tensor.dtype} {list(tensor.shape)} is not {spec}")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    os.replace(partial, path)
