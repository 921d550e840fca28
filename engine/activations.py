"""How much memory a step needs beside weights and state: measured, by running the largest ones there can be.

The steps run over one page and one slot that every position shares, so they need no pools: shapes, not values, decide
what is allocated.
"""

import torch

from engine.config import EngineConfig
from engine.sampler import RandomRows, SamplingInputs, sample
from kernels.sampling import Truncation
from model.batch import ForwardBatch
from model.state import StateViews
from model.state_layout import StateLayout
from model.transformer import Transformer
from runtime.errors import ConfigError


def probe_batch(
    layout: StateLayout, num_requests: int, num_tokens: int, length: int, device: torch.device
) -> ForwardBatch:
    """`num_tokens` tokens of `num_requests` requests, the first with all that are not one for each of the others; the
    last of its tokens is number `length`. All of them live in page 0 and slot 0."""
    first = num_tokens - (num_requests - 1)
    sizes = torch.tensor([first] + [1] * (num_requests - 1), dtype=torch.int32)
    context = (length - sizes).clamp(min=0)
    within = torch.cat([torch.arange(size) for size in sizes.tolist()])
    owner = torch.arange(num_requests, dtype=torch.int32).repeat_interleave(sizes)
    query_start = torch.cat((torch.zeros(1, dtype=torch.int32), sizes.cumsum(0, dtype=torch.int32)))
    last_rows = query_start[1:].long() - 1
    pages = layout.pages_for(int((context + sizes).max()))
    tensors = {
        "token_ids": torch.zeros(num_tokens, dtype=torch.int64),
        "positions": context[owner] + within,
        "query_start": query_start,
        "context_len": context,
        "slot_ids": torch.zeros(num_requests, dtype=torch.int32),
        "page_table": torch.zeros(num_requests, pages, dtype=torch.int32),
        "logits_rows": last_rows,
        "token_request": owner,
    }
    return ForwardBatch(
        **{name: tensor.to(device) for name, tensor in tensors.items()}, one_token_each=num_tokens == num_requests
    )


def run_largest_steps(model: Transformer, layout: StateLayout, config: EngineConfig, length: int) -> None:
    """A prompt chunk of the most tokens at the end of the longest context, then a decode step of the most requests,
    with the most expensive sampling."""
    device = model.device
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=device)
    slots = torch.zeros(1, layout.slot_bytes, dtype=torch.uint8, device=device)
    state = StateViews(layout, pages, slots)
    most, requests = min(config.max_step_tokens, length), config.max_num_seqs
    for num_requests, num_tokens in ((1, most), (requests, requests)):
        logits = model.forward(probe_batch(layout, num_requests, num_tokens, length, device), state)
        rows = torch.arange(logits.shape[0], device=device)
        half = torch.full((logits.shape[0],), 0.5, dtype=torch.float64, device=device)
        truncation = Truncation(rows, torch.full_like(rows, logits.shape[1]), half, logits.shape[1])
        random = RandomRows(rows, half.float(), half, half.float(), truncation)
        sample(logits, SamplingInputs(random=random))


def activation_bytes(model: Transformer, layout: StateLayout, config: EngineConfig, length: int) -> int:
    """Peak of memory on the model's GPU above what it holds now, with prompts and outputs of up to `length` tokens.

    Raises ConfigError naming what to lower if it does not fit."""
    device = model.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        run_largest_steps(model, layout, config, length)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"no room on {device} for a step: lower engine.max_num_batched_tokens={config.max_num_batched_tokens}, "
            f"engine.max_num_seqs={config.max_num_seqs} or engine.max_model_len ({error})"
        ) from error
    peak: int = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak
