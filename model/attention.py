"""One attention sublayer of any kind: window only, with indexed entries (CSA), or with all entries (HCA)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.activations import Activations
from kernels.attention_inputs import attention_inputs
from kernels.rms_norm import rms_norm_activations
from kernels.sparse_attention import sparse_attention, sparse_attention_for_fp8
from kernels.window_ring import insert_window
from model.compressor import OverlapCompressor, PendingCompressor
from model.config import ModelConfig
from model.context import ForwardContext
from model.indexer import Indexer
from model.linear import GroupedOutput, Linear, Numerics, StackedWeight, Weight, WeightHolder
from model.state import LayerState


class Attention:
    """Multi-query attention over one shared key-value vector per token, with a low-rank grouped output."""

    def __init__(self, config: ModelConfig, layer: int, frequencies: Tensor, numerics: Numerics) -> None:
        self._config, self._frequencies, self._quantize = config, frequencies, numerics.packed
        self._ratio = config.compress_ratios[layer]
        self._scale = config.head_dim**-0.5
        heads, dim, rank = config.num_attention_heads, config.head_dim, config.q_lora_rank
        self.wq_a_wkv = Linear((rank, dim), config.hidden_size, numerics)
        self.wq_b = Linear(heads * dim, rank, numerics)
        self.wo_b = Linear(config.hidden_size, config.o_groups * config.o_lora_rank, numerics)
        self.wo_a = GroupedOutput(config, numerics)
        self.q_norm, self.kv_norm, self.attn_sink = (Weight(torch.float32, numerics) for _ in range(3))
        kind, eps = config.layer_kind(layer), config.rms_norm_eps
        self.indexer: Indexer | None = None
        self.overlap_compressor: OverlapCompressor | None = None
        self.pending_compressor: PendingCompressor | None = None
        self.projections: StackedWeight | None = None
        if kind == "csa":
            rows = (*[2 * dim] * 2, *[2 * config.index_head_dim] * 2, config.index_n_heads)
            self.projections = StackedWeight(rows, config.hidden_size, numerics)
            self.overlap_compressor = OverlapCompressor(self.projections, 0, frequencies, eps, numerics)
            index_compressor = OverlapCompressor(self.projections, 2, frequencies, eps, numerics)
            self.indexer = Indexer(config, self.projections, 4, index_compressor, frequencies, numerics)
        elif kind == "hca":
            self.projections = StackedWeight((dim, dim), config.hidden_size, numerics)
            self.pending_compressor = PendingCompressor(self.projections, 0, frequencies, eps, numerics)

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield f"{prefix}.wq_a.weight", self.wq_a_wkv.part(0)
        yield f"{prefix}.wkv.weight", self.wq_a_wkv.part(1)
        yield f"{prefix}.wq_b.weight", self.wq_b.part()
        yield f"{prefix}.wo_a.weight", self.wo_a.part()
        yield f"{prefix}.wo_b.weight", self.wo_b.part()
        yield f"{prefix}.q_norm.weight", self.q_norm
        yield f"{prefix}.kv_norm.weight", self.kv_norm
        yield f"{prefix}.attn_sink", self.attn_sink
        compressor = self.overlap_compressor or self.pending_compressor
        if compressor is not None:
            yield from compressor.holders(f"{prefix}.compressor")
        if self.indexer is not None:
            yield from self.indexer.holders(f"{prefix}.indexer")

    def __call__(self, x: Activations, state: LayerState, context: ForwardContext) -> Tensor:
        config, index, branch = self._config, context.index, context.branch
        angles = context.angles(self._frequencies)
        projected: tuple[Tensor, ...] = ()
        if self.projections is not None:
            branch.fork()
            with branch:
                projected = self._compress(self.projections, x.plain, state, context)
        latent, row = self.wq_a_wkv.split(x.for_fp8)
        normed = rms_norm_activations(latent, self.q_norm.value, config.rms_norm_eps, quantize=self._quantize)
        selected: Tensor | None = None
        if self.indexer is not None:
            branch.fork()
            with branch:
                selected = self.indexer(normed, projected, state, context)
        heads = self.wq_b.heads(normed.for_fp8, config.head_dim, angles, config.rms_norm_eps)
        query, chunk = attention_inputs(
            heads.values_THD, row, self.kv_norm.value, angles, config.rms_norm_eps, state.window, index,
            simulate=context.simulate, finished=heads.finished,
        )  # fmt: skip
        # An entry closed by a token of this pass is visible to that token: state first, then attention.
        branch.join()
        inputs = (
            query, chunk, state.window, self.attn_sink.value, index, self._scale, state.entries, selected, self._ratio,
        )  # fmt: skip
        output = sparse_attention_for_fp8(*inputs, angles) if self.wo_a.takes_codes else sparse_attention(*inputs)
        if not index.one_token_each:
            # Only now: a chunk longer than the window overwrites rows that its own first tokens still read.
            insert_window(chunk, state.window, index)
        return self.wo_b(self.wo_a.from_heads(output, angles))

    def _compress(
        self, projections: StackedWeight, x_TD: Tensor, state: LayerState, context: ForwardContext
    ) -> tuple[Tensor, ...]:
        """Advances the layer's entries; -> what the layer's float32 projections made of the input."""
        projected = projections(x_TD)
        assert state.entries is not None
        if self.overlap_compressor is not None:
            assert state.compressor is not None
            self.overlap_compressor(projected, state.compressor, state.entries, context)
        else:
            assert self.pending_compressor is not None
            assert state.pending is not None
            self.pending_compressor(projected, state.pending, state.entries, context)
        return projected
