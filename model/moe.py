"""The MoE sublayer: a router by score or by token id, the routed experts of this rank, one shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kernels.activations import Activations
from kernels.exchange_rows import QuantizedTokens
from kernels.moe import route_by_score, route_by_token, routed_experts, swiglu
from kernels.quantize import QuantizedRows
from model.config import ModelConfig
from model.context import ForwardContext
from model.linear import ExpertBank, Linear, Numerics, Weight, WeightHolder
from model.placement import LayerShare


class ExpertCompute(Protocol):
    """Sums over this rank's experts."""

    def __call__(
        self,
        x_UD: Tensor | QuantizedTokens,
        experts_UK: Tensor,
        weights_UK: Tensor,
        /,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """-> [U, D] in `dtype`."""


class SentTokens(Protocol):
    """Tokens on their way to their experts."""

    def through(self, compute: ExpertCompute, shared_TD: Tensor) -> Tensor:
        """Compute what arrives here, its own tokens and others', and collect the sums over all ranks for this rank's
        tokens, with the shared expert's output: [T, D] in that one's dtype, added in float32 and rounded once."""


class ExpertParallel(Protocol):
    """Moves tokens between the ranks that hold the experts. Every rank makes the same calls in the same order, also
    with zero tokens."""

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> SentTokens:
        """Begin; what is computed until `through` hides the way."""


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

    def __call__(self, x_TD: Tensor | QuantizedRows) -> Tensor:
        gate, up = self.w13.split(x_TD)
        return self.w2(swiglu(gate, up, self._limit, quantize=self.w2.codes is not None))


class MixtureOfExperts:
    """Routed and shared experts of one layer."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        share: LayerShare,
        parallel: ExpertParallel | None,
        numerics: Numerics,
        counts_E: Tensor | None = None,
    ) -> None:
        """counts_E: int64 [E + 1], counts the tokens that chose each expert, and padding."""
        self._config, self._share, self._parallel, self._counts = config, share, parallel, counts_E
        self._nowhere = config.n_routed_experts
        self._places: Tensor | None = None
        if share.places is not None:
            self._places = torch.tensor((*share.places, self._nowhere), device=numerics.device)
        self.gate = Weight(numerics.wide, numerics)
        by_token = config.is_hash_layer(layer)
        self.bias = None if by_token else Weight(torch.float32, numerics)
        self.tid2eid = Weight(torch.int32, numerics) if by_token else None
        self.shared = SharedExpert(config, numerics)
        self.bank = ExpertBank(config, range(share.first, share.first + len(share.experts)), numerics)

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield f"{prefix}.gate.weight", self.gate
        if self.bias is not None:
            yield f"{prefix}.gate.bias", self.bias
        if self.tid2eid is not None:
            yield f"{prefix}.gate.tid2eid", self.tid2eid
        yield from self.shared.holders(f"{prefix}.shared_experts")
        for place, expert in enumerate(self._share.experts, start=self._share.first):
            for matrix in ("w1", "w2", "w3"):
                yield f"{prefix}.experts.{expert}.{matrix}.weight", self.bank.holder(place, matrix)

    def __call__(self, x: Activations, context: ForwardContext) -> Tensor:
        config, scale, x_TD = self._config, self._config.routed_scaling_factor, x.plain
        context.branch.fork()
        # Padding goes to an expert that no rank holds, and reads no weights.
        if self.bias is not None:
            experts, weights = route_by_score(
                x_TD, self.gate.value, self.bias.value, config.num_experts_per_tok, scale, real_T=context.real_T,
                nowhere=self._nowhere,
            )  # fmt: skip
        else:
            assert self.tid2eid is not None
            experts, weights = route_by_token(
                x_TD, self.gate.value, self.tid2eid.value, context.token_ids, scale, real_T=context.real_T,
                nowhere=self._nowhere,
            )  # fmt: skip
        if self._counts is not None:
            chosen = experts.flatten()
            self._counts.index_add_(0, chosen, torch.ones_like(chosen))
        if self._places is not None:
            experts = self._places[experts]

        compute = partial(
            routed_experts,
            local=self.bank.weights,
            limit=config.swiglu_limit,
            simulate=context.simulate,
            num_experts=config.n_routed_experts,
        )
        sent = None if self._parallel is None else self._parallel.send(x_TD, experts, weights)
        with context.branch:
            shared = self.shared(x.for_fp8)
        context.branch.join()
        if sent is None:
            return compute(x_TD, experts, weights, shared_TD=shared)
        return sent.through(compute, shared)
