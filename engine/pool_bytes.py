"""The memory of a rank's pools as a transfer sees it: bytes at addresses, on a device that other threads use as well.

Nothing here waits for the step in flight or makes it wait: the engine's steps are on a stream of its own, which the
default stream is not ordered with, and records are copied out on another.
"""

import torch
from torch import Tensor

from engine.gpu_direct import flush_of


class PoolBytes:
    """`kv_transfer.regions.PoolMemory` of pools that are tensors."""

    def __init__(self, *pools: Tensor) -> None:
        """pools: contiguous uint8, all on one device."""
        self._pools = [pool.view(-1) for pool in pools]
        self._device = pools[0].device
        on_gpu = self._device.type == "cuda"
        self._reads = torch.cuda.Stream(self._device) if on_gpu else None
        self._flush = flush_of(self._device) if on_gpu else None
        self._gpus = range(torch.cuda.device_count() if on_gpu else 0)

    def bind_thread(self) -> None:
        """Make the pools' device the current one of the calling thread, and create its context there."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            # A call that reaches the driver: choosing a device alone does not.
            torch.cuda.default_stream(self._device).synchronize()

    def settle(self) -> None:
        """Wait for the default stream: a library that copies from pageable host memory does so there, and such a call
        returns when the bytes are staged, which is before the device has them. Then for what network devices wrote.

        The default stream of every GPU that the process uses: a thread of a library that never chose one copies on the
        first one's, wherever the memory is."""
        for index in self._gpus:
            if torch._C._cuda_hasPrimaryContext(index):
                torch.cuda.default_stream(index).synchronize()
        if self._flush is not None:
            self._flush()

    def read(self, address: int, num_bytes: int) -> memoryview:
        """Those bytes on the host; of a device's a copy. Raises ValueError for bytes outside of the pools."""
        for pool in self._pools:
            start = address - pool.data_ptr()
            if not 0 <= start <= start + num_bytes <= pool.numel():
                continue
            record = pool[start : start + num_bytes]
            if self._reads is None:
                return memoryview(record.numpy())
            host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            with torch.cuda.stream(self._reads):
                host.copy_(record, non_blocking=True)
            self._reads.synchronize()
            return memoryview(host.numpy())
        raise ValueError(f"{num_bytes} bytes at {address:#x} are in none of {len(self._pools)} pools")
