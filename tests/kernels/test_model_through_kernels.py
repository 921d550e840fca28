"""A whole model whose every op runs its GPU kernel: packed weights, quantised state, chunks and single tokens.

Without a GPU in Triton's interpreter, so the model is as small as one of each kind of layer allows."""

from __future__ import annotations

import contextlib

import msgspec
import torch

from benchmarks.gpu_bringup import chunk_batch, mirror, move, relative
from benchmarks.gpu_rank import build_rank
from engine.memory import PoolSizes
from kernels.dispatch import forced_triton
from model.presets import tiny

CONFIG = msgspec.structs.replace(
    tiny(vocab_size=128), num_hidden_layers=3, compress_ratios=(0, 4, 16), num_nextn_predict_layers=0,
    num_attention_heads=2, n_routed_experts=4, index_n_heads=2,
    hc_sinkhorn_iters=2, index_topk=2,
)  # fmt: skip


def test_logits_are_as_near_to_float32_as_bfloat16_allows(device):
    rank = build_rank(CONFIG, PoolSizes(num_pages=4, num_slots=2, max_model_len=1024), str(device))
    exact, rounded = mirror(rank, torch.float32), mirror(rank, torch.bfloat16)
    forced = contextlib.nullcontext if device.type == "cuda" else forced_triton
    for pool in (rank.memory.pages, rank.memory.slots, exact.memory.slots, rounded.memory.slots):
        pool.fill_(0xFF)
    start = 0
    for size in (13, 1):
        batch = chunk_batch(start, size, CONFIG.vocab_size)
        start += size
        wanted, near = (other.model.forward(move(batch, other.device), other.state) for other in (exact, rounded))
        with forced():
            got = rank.model.forward(move(batch, rank.device), rank.state)
        assert got.isfinite().all()
        assert relative(got, wanted) < 2 * relative(near, wanted) + 0.05
