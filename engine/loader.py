"""From a checkpoint directory and a configuration to a rank that can compute: model, state memory, resolved numbers."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from engine.activations import activation_bytes
from engine.config import EngineConfig
from engine.decode_graphs import auto_sizes
from engine.device import enter
from engine.dummy_weights import load_dummy_weights
from engine.intake import EngineShape
from engine.memory import StateMemory, plan_pools, state_budget
from model.batch import ForwardBatch
from model.checkpoint import load_weights
from model.config import ModelConfig
from model.lm_head import HeadParallel
from model.moe import ExpertParallel
from model.placement import ExpertShare
from model.state import StateViews
from model.state_layout import IndexFormat, RowFormat, StateLayout, build_state_layout
from model.transformer import Transformer
from runtime.errors import ConfigError

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Sharing:
    """One rank's part in a model that several ranks hold together."""

    experts: ExpertShare
    exchange: ExpertParallel
    head: HeadParallel | None = None
    """None: every rank has the whole vocabulary head."""
    least: Callable[[int], int] = lambda value: value
    """The smallest of what all ranks call with; waits for all."""


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """Everything a step needs. `config` has no "auto" left."""

    config: EngineConfig
    model_config: ModelConfig
    layout: StateLayout
    memory: StateMemory
    shape: EngineShape
    device: torch.device
    model: Transformer
    state: StateViews

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Advance this rank's state by a batch; logits float32 [L, vocab]."""
        return self.model.forward(batch, self.state)

    def features(self, batch: ForwardBatch) -> Tensor:
        """The same up to the vocabulary head, `model.logits`."""
        return self.model.features(batch, self.state)


def load_rank(
    config: EngineConfig,
    *,
    holds_states: bool,
    rank: int = 0,
    sharing: Sharing | None = None,
    count_experts: bool = False,
    progress: bool = True,
) -> LoadedRank:
    """Load the weights and allocate the pools of one rank. The calling thread is the one that runs its steps: on a GPU
    it works on a stream of its own afterwards (`engine.device`).

    holds_states: finished prompts stay in slots of their own until another rank has fetched them.
    sharing: what this rank has of the model and how it reaches the rest; None: everything.
    count_experts: keep count of the tokens that choose each expert.
    Raises ConfigError and CheckpointError naming the field, tensor or number.
    """
    started = time.monotonic()
    model_config = ModelConfig.load(config.model)
    config = resolve(config, rank)
    layout = build_state_layout(
        model_config,
        row_format=_known(config.kv_cache_dtype),
        index_format=_known_index(config.index_cache_dtype),
        page_tokens=config.block_size,
    )
    device = torch.device(config.device)
    enter(device)
    try:
        model = Transformer(
            model_config,
            dtype=_DTYPES[config.dtype],
            numerics=config.numerics,
            experts=sharing.experts if sharing is not None else None,
            expert_parallel=sharing.exchange if sharing is not None else None,
            head_parallel=sharing.head if sharing is not None else None,
            count_experts=count_experts,
            device=device,
            packed_weights=device.type == "cuda" and config.numerics == "released",
            fp8_output=config.output_projection == "fp8",
        )
        if config.load_format == "dummy":
            load_dummy_weights(model, model_config, config.seed)
        else:
            load_weights(config.model, model, progress=progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights do not fit on {device}: share the experts over more ranks (data_parallel_size with "
            f"enable_expert_parallel) or choose a larger device ({error})"
        ) from error
    least: Callable[[int], int] = sharing.least if sharing is not None else lambda value: value
    # A step takes all ranks of a group, and each may have waited for its weights for another while.
    least(0)
    # What a step needs depends on the longest request, and how long that may be on what a step needs: begin high.
    reserve = 0
    if device.type == "cuda" and config.kv_cache_memory_bytes is None and config.num_pages == "auto":
        roomy = plan_pools(
            config, model_config, layout, holds_states=holds_states, budget_bytes=state_budget(config, device)
        )
        reserve = activation_bytes(model, layout, config, least(roomy.max_model_len))
        if model.expert_counts is not None:
            model.expert_counts.zero_()
    budget = state_budget(config, device, reserve)
    sizes = plan_pools(config, model_config, layout, holds_states=holds_states, budget_bytes=budget)
    # Ranks capture the same steps, which depend on the longest request.
    sizes = replace(sizes, max_model_len=least(sizes.max_model_len))
    memory = StateMemory.allocate(sizes, layout, device)
    config = msgspec.structs.replace(config, num_pages=sizes.num_pages, max_model_len=sizes.max_model_len)
    shape = EngineShape(
        vocab_size=model_config.vocab_size,
        eos_ids=eos_ids(Path(config.model), model_config),
        max_model_len=sizes.max_model_len,
        page_tokens=layout.page_tokens,
        num_pages=sizes.num_pages,
        num_slots=sizes.num_slots,
        chunk_alignment=max(1, *model_config.compress_ratios),
    )
    log.info(
        "loaded in %.1f s on %s, %.2f GiB kept for steps: %d pages of %d B (%d tokens each), %d slots of %d B, "
        "max_model_len=%d",
        time.monotonic() - started, device, reserve / 2**30, sizes.num_pages, layout.page_bytes,
        layout.page_tokens, sizes.num_slots, layout.slot_bytes, sizes.max_model_len,
    )  # fmt: skip
    state = StateViews(layout, memory.pages, memory.slots)
    return LoadedRank(config, model_config, layout, memory, shape, device, model, state)


def resolve(config: EngineConfig, rank: int) -> EngineConfig:
    """Replace "auto" in everything that does not depend on free memory. Raises ConfigError for a device not there."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{rank % max(1, torch.cuda.device_count())}"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"engine.device={config.device}: no CUDA device is usable here")
    on_gpu = device.startswith("cuda")
    dtype = ("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype
    wide: Literal["bf16", "f32"] = "f32" if dtype == "float32" else "bf16"
    released = config.numerics == "released"
    sizes = config.cudagraph_capture_sizes
    if config.enforce_eager or (sizes == "auto" and not on_gpu):
        sizes = ()
    elif sizes == "auto":
        sizes = auto_sizes(config.max_num_seqs)
    return msgspec.structs.replace(
        config,
        async_scheduling=("on" if on_gpu else "off") if config.async_scheduling == "auto" else config.async_scheduling,
        cudagraph_capture_sizes=sizes,
        device=device,
        dtype=dtype,
        output_projection=(
            ("fp8" if released and on_gpu else "wide")
            if config.output_projection == "auto"
            else config.output_projection
        ),
        kv_cache_dtype=("fp8" if released else wide) if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        index_cache_dtype=(
            ("mxfp4" if released else wide) if config.index_cache_dtype == "auto" else config.index_cache_dtype
        ),
    )


def eos_ids(directory: Path, model_config: ModelConfig) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's where there is one, else config.json's. Raises ConfigError."""
    path = directory / "generation_config.json"
    if not path.exists():
        return (model_config.eos_token_id,)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_GenerationConfig).eos_token_id
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    ids = (found,) if isinstance(found, int) else found or (model_config.eos_token_id,)
    for token_id in ids:
        if not 0 <= token_id < model_config.vocab_size:
            raise ConfigError(f"{path}: eos_token_id {token_id} is outside the vocabulary of {model_config.vocab_size}")
    return ids


class _GenerationConfig(msgspec.Struct, frozen=True):
    eos_token_id: int | tuple[int, ...] | None = None


def _known(row_format: Literal["auto", "fp8", "bf16", "f32"]) -> RowFormat:
    assert row_format != "auto"
    return row_format


def _known_index(index_format: Literal["auto", "mxfp4", "fp8", "bf16", "f32"]) -> IndexFormat:
    assert index_format != "auto"
    return index_format
