"""Writes of network devices into a GPU's memory, and when kernels that are launched afterwards see them."""

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import torch

from runtime.errors import EngineError

log = logging.getLogger(__name__)

# Of the driver's interface: attributes of a device, values of them, and the arguments of a flush.
_FLUSH_OPTIONS, _WRITES_ORDERING = 117, 118
_HOST_MAY_FLUSH = 1
_ORDERED_FOR_OWNER = 100
_CURRENT_CONTEXT, _TO_OWNER = 0, 100


def flush_of(device: torch.device, driver: Any = None) -> Callable[[], None] | None:
    """What makes all writes that have arrived visible to the GPU, for a thread that is bound to it; None where they are
    visible anyway. The flush raises EngineError when the driver refuses it."""
    driver = driver or ctypes.CDLL("libcuda.so.1")
    index = torch.cuda.current_device() if device.index is None else device.index
    if _attribute(driver, _WRITES_ORDERING, index) >= _ORDERED_FOR_OWNER:
        return None
    if not _attribute(driver, _FLUSH_OPTIONS, index) & _HOST_MAY_FLUSH:
        log.warning("%s neither orders writes of network devices nor lets them be flushed: use no RDMA here", device)
        return None

    def flush() -> None:
        error = driver.cuFlushGPUDirectRDMAWrites(_CURRENT_CONTEXT, _TO_OWNER)
        if error:
            raise EngineError(f"writes of network devices into {device} could not be flushed: CUDA error {error}")

    return flush


def _attribute(driver: Any, attribute: int, index: int) -> int:
    value = ctypes.c_int()
    error = driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)
    if error:
        raise EngineError(f"attribute {attribute} of GPU {index} cannot be read: CUDA error {error}")
    return value.value
