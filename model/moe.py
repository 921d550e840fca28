"""The MoE sublayer: a router by score or by token id, the routed experts of this rank, one shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from kernels.moe import route_by_score, route_by_token, routed_experts, swiglu
from model.config import ModelConfig
from model.context import ForwardContext
from model.linear import ExpertBank, Linear, Numerics, Weight, WeightHolder


class ExpertParallel(Protocol):
    """Moves tokens between the ranks that hold the experts. Every rank makes the same calls in the same order, also
    with zero tokens."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> the tokens this rank computes (its own and others'), with their routing."""

    def combine(self, partial_UD: Tensor) -> Tensor:
        """float32 sums of local experts for the dispatched tokens -> float32 [T, D] over all ranks, own tokens."""


class SharedExpert:
    """The expert every token passes through; clamped like the routed ones."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        self._limit = config.swiglu_limit
        width = config.n_shared_experts * config.moe_intermediate_size
        self.w13 = Linear((width, width), config.hidden_size, numerics)
        self.w2 = Linear(config.hidden_size, width, numerics)

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield f"{prefix}.w1.weight", self.w13.part(0)
        yield f"{prefix}.w2.weight", self.w2.part()
        yield f"{prefix}.w3.weight", self.w13.part(1)

    def __call__(self, x_TD: Tensor) -> Tensor:
        gate, up = self.w13.split(x_TD)
        return self.w2(swiglu(gate, up, self._limit).to(x_TD.dtype))


class MixtureOfExperts:
    """Routed and shared experts of one layer."""

    def __init__(
        self, config: ModelConfig, layer: int, experts: range, parallel: ExpertParallel | None, numerics: Numerics
    ) -> None:
        self._config, self._experts, self._parallel = config, experts, parallel
        self.gate = Weight(torch.float32, numerics)
        by_token = config.is_hash_layer(layer)
        self.bias = None if by_token else Weight(torch.float32, numerics)
        self.tid2eid = Weight(torch.int32, numerics) if by_token else None
        self.shared = SharedExpert(config, numerics)
        self.bank = ExpertBank(config, experts, numerics)

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield f"{prefix}.gate.weight", self.gate
        if self.bias is not None:
            yield f"{prefix}.gate.bias", self.bias
        if self.tid2eid is not None:
            yield f"{prefix}.gate.tid2eid", self.tid2eid
        yield from self.shared.holders(f"{prefix}.shared_experts")
        for expert in self._experts:
            for matrix in ("w1", "w2", "w3"):
                yield f"{prefix}.experts.{expert}.{matrix}.weight", self.bank.holder(expert, matrix)

    def __call__(self, x_TD: Tensor, context: ForwardContext) -> Tensor:
        config = self._config
        if self.bias is not None:
            experts, weights = route_by_score(
                x_TD, self.gate.value, self.bias.value, config.num_experts_per_tok, config.routed_scaling_factor
            )
        else:
            assert self.tid2eid is not None
            experts, weights = route_by_token(
                x_TD, self.gate.value, self.tid2eid.value, context.token_ids, config.routed_scaling_factor
            )
        routed_x = x_TD
        if self._parallel is not None:
            routed_x, experts, weights = self._parallel.dispatch(x_TD, experts, weights)
        routed = routed_experts(
            routed_x, experts, weights, self.bank.weights, limit=config.swiglu_limit, simulate=context.simulate
        )
        shared = self.shared(x_TD)
        if self._parallel is not None:
            routed = self._parallel.combine(routed)
        return (routed + shared.float()).to(x_TD.dtype)
