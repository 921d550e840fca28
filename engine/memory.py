"""The bytes behind pages and slots: how many of them fit, and the tensors that hold them."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from model.config import ModelConfig
from model.state_layout import StateLayout
from runtime.errors import ConfigError

log = logging.getLogger(__name__)

_CPU_SHARE = 0.25
"""Part of the machine's free memory that state takes when no number is configured: others run here too."""
_GPU_RESERVE = 2 << 30
"""Bytes kept for communicators, workspaces of libraries and captured graphs."""


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """How much state a rank holds."""

    num_pages: int
    num_slots: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class StateMemory:
    """The pools' memory, uninitialised. Readers know from token counts which bytes mean something."""

    pages: Tensor
    """uint8 [num_pages, page_bytes], contiguous."""
    slots: Tensor
    """uint8 [num_slots + 1, slot_bytes], contiguous. The last one is spare: padding writes there."""

    @classmethod
    def allocate(cls, sizes: PoolSizes, layout: StateLayout, device: torch.device) -> "StateMemory":
        """Raises ConfigError naming what to lower when the device has no room."""
        num_slots = sizes.num_slots + 1
        wanted = sizes.num_pages * layout.page_bytes + num_slots * layout.slot_bytes
        try:
            return cls(
                pages=torch.empty((sizes.num_pages, layout.page_bytes), dtype=torch.uint8, device=device),
                slots=torch.empty((num_slots, layout.slot_bytes), dtype=torch.uint8, device=device),
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise ConfigError(
                f"no room on {device} for {sizes.num_pages} pages of {layout.page_bytes} B and {num_slots} slots "
                f"of {layout.slot_bytes} B ({_gib(wanted)}): lower engine.num_pages, gpu_memory_utilization or "
                f"max_num_seqs ({error})"
            ) from error


def plan_pools(
    config: EngineConfig, model: ModelConfig, layout: StateLayout, *, holds_states: bool, budget_bytes: int
) -> PoolSizes:
    """Resolve num_pages and max_model_len within `budget_bytes`. Raises ConfigError with the numbers.

    max_model_len "auto" is the model's own limit, or else the length of one request that leaves a page to each of the
    others that may run beside it, but not less than half of all pages.
    """
    longest = model.max_position_embeddings
    if isinstance(config.max_model_len, int) and config.max_model_len > longest:
        raise ConfigError(f"engine.max_model_len={config.max_model_len} exceeds the model's limit of {longest} tokens")
    num_slots = config.max_num_seqs + (config.max_held_requests if holds_states else 0)
    wanted_len = longest if config.max_model_len == "auto" else config.max_model_len
    if config.num_pages != "auto":
        num_pages = config.num_pages
    else:
        left = budget_bytes - (num_slots + 1) * layout.slot_bytes
        num_pages = left // layout.page_bytes
        if num_pages < 1:
            raise ConfigError(
                f"{_gib(budget_bytes)} for state do not hold {num_slots} slots of {layout.slot_bytes} B and one page "
                f"of {layout.page_bytes} B: raise engine.kv_cache_memory_bytes or engine.gpu_memory_utilization, or "
                f"lower engine.max_num_seqs or engine.max_num_batched_tokens"
            )
        num_pages = min(num_pages, num_slots * layout.pages_for(wanted_len))
    if config.max_model_len != "auto":
        max_model_len = config.max_model_len
    else:
        largest = max(num_pages - (config.max_num_seqs - 1), -(-num_pages // 2))
        max_model_len = min(longest, largest * layout.page_tokens)
    if max_model_len > num_pages * layout.page_tokens:
        raise ConfigError(
            f"engine.max_model_len={max_model_len} needs {layout.pages_for(max_model_len)} pages of "
            f"{layout.page_tokens} tokens and there are {num_pages}: lower it, or raise engine.num_pages or "
            f"engine.kv_cache_memory_bytes"
        )
    if max_model_len < wanted_len:
        log.info("max_model_len is %d: %d pages do not hold the model's %d", max_model_len, num_pages, longest)
    return PoolSizes(num_pages=num_pages, num_slots=num_slots, max_model_len=max_model_len)


def state_budget(config: EngineConfig, device: torch.device, activation_bytes: int = 0) -> int:
    """Bytes for pages and slots, given what is in use now; call it when the weights are loaded.

    activation_bytes: what a step needs on a GPU, where state takes all that is left."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - config.gpu_memory_utilization) * total) - _GPU_RESERVE - activation_bytes
    return int(_available_host_bytes() * _CPU_SHARE)


def _available_host_bytes() -> int:
    """What this process could still use: the machine's available memory, or what its control group leaves."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        available = min(available, int(limit) - int(used))
    return available


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
