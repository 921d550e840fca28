"""The bytes behind an address in a rank's pools, for those who know memory by addresses only (checksums of transfers).

Of pools on a GPU a copy on a stream of its own: whoever asks knows that the record is complete, and must wait neither
for the step in flight nor make it wait.
"""

import torch
from torch import Tensor


class PoolBytes:
    """(address, num_bytes) -> those bytes on the host."""

    def __init__(self, *pools: Tensor) -> None:
        """pools: contiguous uint8."""
        self._pools = [pool.view(-1) for pool in pools]
        self._streams = [torch.cuda.Stream(pool.device) if pool.is_cuda else None for pool in pools]

    def bind_thread(self) -> None:
        """Make the pools' device the current one of the calling thread, and create its context there."""
        for pool in self._pools:
            if pool.is_cuda:
                torch.cuda.set_device(pool.device)
                # A call that reaches the driver: choosing a device alone does not.
                torch.cuda.synchronize(pool.device)

    def __call__(self, address: int, num_bytes: int) -> memoryview:
        """Raises ValueError for bytes outside of the pools."""
        for pool, stream in zip(self._pools, self._streams, strict=True):
            start = address - pool.data_ptr()
            if not 0 <= start <= start + num_bytes <= pool.numel():
                continue
            record = pool[start : start + num_bytes]
            if stream is None:
                return memoryview(record.numpy())
            host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            with torch.cuda.stream(stream):
                host.copy_(record, non_blocking=True)
            stream.synchronize()
            return memoryview(host.numpy())
        raise ValueError(f"{num_bytes} bytes at {address:#x} are in none of {len(self._pools)} pools")
