"""The lightning indexer of a CSA layer: keeps its keys up to date and picks the entries each token attends to."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from kernels.activations import Activations
from kernels.indexer import index_query, select_entries
from model.compressor import OverlapCompressor
from model.config import CSA_RATIO, ModelConfig
from model.context import ForwardContext
from model.linear import Linear, Numerics, StackedWeight, WeightHolder
from model.state import LayerState


class Indexer:
    """Queries come from the attention's query latent, head weights and keys from the sublayer's input.

    Head weights are the layer's projection `number`, in float32. Their common factor of the released program is left
    out: it cannot change which entries are best."""

    def __init__(
        self,
        config: ModelConfig,
        projections: StackedWeight,
        number: int,
        compressor: OverlapCompressor,
        frequencies: Tensor,
        numerics: Numerics,
    ) -> None:
        self._projections, self._number = projections, number
        self._frequencies = frequencies
        self._heads, self._dim, self._topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(self._heads * self._dim, config.q_lora_rank, numerics)
        self.compressor = compressor

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield f"{prefix}.wq_b.weight", self.wq_b.part()
        yield f"{prefix}.weights_proj.weight", self._projections.part(self._number)
        yield from self.compressor.holders(f"{prefix}.compressor")

    def __call__(
        self,
        latent: Activations,
        projected: tuple[Tensor, ...],
        state: LayerState,
        context: ForwardContext,
    ) -> Tensor:
        """projected: float32 outputs of the layer's projections. -> int32 [T, K]: entries per token, -1 = none."""
        assert state.index_keys is not None
        assert state.index_compressor is not None
        self.compressor(projected, state.index_compressor, state.index_keys, context)
        query = self.wq_b(latent.for_fp8).unflatten(-1, (self._heads, self._dim))
        query = index_query(query, context.angles(self._frequencies), state.index_keys, simulate=context.simulate)
        weights = projected[self._number]
        return select_entries(query, weights, state.index_keys, context.index, CSA_RATIO, self._topk)
