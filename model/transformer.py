"""The whole network: token ids and state in, logits out. Knows batches and state, not requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from kernels.activations import Activations
from kernels.hyper_connection import HyperSettings, Mix, hyper_head, hyper_post, hyper_post_pre, hyper_pre
from kernels.rms_norm import rms_norm
from model.attention import Attention
from model.batch import ForwardBatch
from model.branch import IN_TURN, Branch
from model.config import ModelConfig
from model.context import ForwardContext
from model.hyper_connection import HyperConnection
from model.linear import Numerics, Weight, WeightHolder
from model.lm_head import HeadParallel, LmHead
from model.moe import ExpertParallel, MixtureOfExperts
from model.placement import ExpertShare, LayerShare
from model.rope import layer_frequencies
from model.state import LayerState, StateViews

NumericsName = Literal["plain", "released"]


class DecoderLayer:
    """Attention and MoE, each inside its hyper-connection."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        frequencies: Tensor,
        share: LayerShare,
        parallel: ExpertParallel | None,
        numerics: Numerics,
        counts_E: Tensor | None,
    ) -> None:
        self.hc_attn = HyperConnection(config.hc_mult, numerics)
        self.hc_ffn = HyperConnection(config.hc_mult, numerics)
        self.attn_norm, self.ffn_norm = Weight(torch.float32, numerics), Weight(torch.float32, numerics)
        self.attn = Attention(config, layer, frequencies, numerics)
        self.ffn = MixtureOfExperts(config, layer, share, parallel, numerics, counts_E)

    def holders(self, prefix: str) -> Iterator[tuple[str, WeightHolder]]:
        yield from self.hc_attn.holders(f"{prefix}.hc_attn")
        yield from self.hc_ffn.holders(f"{prefix}.hc_ffn")
        yield f"{prefix}.attn_norm.weight", self.attn_norm
        yield f"{prefix}.ffn_norm.weight", self.ffn_norm
        yield from self.attn.holders(f"{prefix}.attn")
        yield from self.ffn.holders(f"{prefix}.ffn")

    def sublayers(self) -> Iterator[tuple[HyperConnection, Weight, Sublayer]]:
        """(connection, norm, computation) in order."""
        yield self.hc_attn, self.attn_norm, self.attn
        yield self.hc_ffn, self.ffn_norm, lambda x, state, context: self.ffn(x, context)


Sublayer = Callable[[Activations, LayerState, ForwardContext], Tensor]


class Transformer:
    """One rank's share of the model: everything but the experts outside `experts`, and with `head_parallel` a part of
    the vocabulary head.

    dtype: activations and weights of the projections, float32 or bfloat16; norms, hyper-connections, routing, softmax,
    compressors and logits compute in float32 either way.
    numerics: "plain" computes without quantisation (rows in bf16 or f32); "released" rounds activations, KV rows and
    index keys where and how DeepSeek's released program does, in any row format. On the CPU weights are dequantised
    when loaded; multiplying dequantised FP8 or FP4 weights with simulated activations is the released arithmetic up to
    the order of float32 sums.
    packed_weights: keep FP8 and FP4 weights packed, for kernels that multiply them directly ("released" only).
    fp8_output: round the input of the first output projection to e4m3 as well ("released" only): the released program
    multiplies this one in the activation dtype, other servers do not.
    count_experts: keep count of how many tokens of this rank choose each expert, in `expert_counts`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        numerics: NumericsName = "plain",
        experts: range | ExpertShare | None = None,
        expert_parallel: ExpertParallel | None = None,
        head_parallel: HeadParallel | None = None,
        device: torch.device | str = "cpu",
        packed_weights: bool = False,
        fp8_output: bool = False,
        count_experts: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: float32 or bfloat16")
        if packed_weights and numerics != "released":
            raise ValueError("packed_weights: quantised products are the released numerics")
        if fp8_output and numerics != "released":
            raise ValueError("fp8_output: quantised products are the released numerics")
        experts = range(config.n_routed_experts) if experts is None else experts
        share = experts if isinstance(experts, ExpertShare) else ExpertShare(experts)
        alike = share.experts
        if alike.step != 1 or not 0 <= alike.start < alike.stop <= config.n_routed_experts:
            raise ValueError(f"experts={alike}: need a contiguous range within {config.n_routed_experts}")
        if len(alike) < config.n_routed_experts and expert_parallel is None:
            raise ValueError(f"experts={alike}: part of the experts needs expert_parallel")
        self.config, self.dtype = config, dtype
        self.numerics: NumericsName = numerics
        self.device = torch.device(device)
        self.fp8_output = fp8_output
        self._simulate = numerics == "released"
        self._packed = packed_weights
        self._branch = Branch(torch.cuda.Stream(self.device)) if self.device.type == "cuda" else IN_TURN
        self._hyper = HyperSettings(config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)
        how = Numerics(dtype, self._simulate, packed_weights, self.device, fp8_output)
        self.embed = Weight(dtype, how)
        self.head = LmHead(config.vocab_size, how, head_parallel)
        self.norm = Weight(torch.float32, how)
        self.hc_head = HyperConnection(config.hc_mult, how, head=True)
        tables: dict[bool, Tensor] = {}  # one table per kind of rotation, so that angles are computed once per pass

        def frequencies(layer: int) -> Tensor:
            compresses = config.layer_kind(layer) != "swa"
            if compresses not in tables:
                tables[compresses] = layer_frequencies(config, layer).to(self.device)
            return tables[compresses]

        self.expert_counts: Tensor | None = None
        """int64 [layers, E + 1], with `count_experts`: tokens since the start; the last column counts padding."""
        if count_experts:
            shape = (config.num_hidden_layers, config.n_routed_experts + 1)
            self.expert_counts = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.layers = [
            DecoderLayer(
                config,
                layer,
                frequencies(layer),
                share.layer(layer),
                expert_parallel,
                how,
                None if self.expert_counts is None else self.expert_counts[layer],
            )
            for layer in range(config.num_hidden_layers)
        ]

    def holders(self) -> dict[str, WeightHolder]:
        """Every weight this rank needs, by checkpoint name (scales come along with their weights)."""
        found: dict[str, WeightHolder] = {
            "embed.weight": self.embed,
            "head.weight": self.head,
            "norm.weight": self.norm,
            **dict(self.hc_head.holders("hc_head")),
        }
        for layer, decoder in enumerate(self.layers):
            found.update(decoder.holders(f"layers.{layer}"))
        return found

    def forward(self, batch: ForwardBatch, state: StateViews) -> Tensor:
        """Advances the state by the batch's tokens; -> logits float32 [L, vocab] of `batch.logits_rows`."""
        return self.logits(self.features(batch, state))

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def features(self, batch: ForwardBatch, state: StateViews) -> Tensor:
        """As `forward`, up to the vocabulary head: [L, D] in the activation dtype. Captured decode steps end here."""
        if not self._simulate and {state.layout.row_format, state.layout.index_format} & {"fp8", "mxfp4"}:
            raise ValueError("plain numerics keep rows and index keys in bf16 or f32")
        context = ForwardContext(
            token_ids=batch.token_ids,
            index=batch.index(state.layout.page_tokens),
            dtype=self.dtype,
            simulate=self._simulate,
            real_T=None if batch.spare_slot is None else batch.slot_ids != batch.spare_slot,
            # The kernels of a chunk fill a GPU one by one.
            branch=self._branch if batch.one_token_each else IN_TURN,
        )
        streams = self._backbone(batch.token_ids, state, context)[batch.logits_rows]
        collapsed = hyper_head(streams, self.hc_head.weights, self._hyper)
        return rms_norm(collapsed, self.norm.value, self.config.rms_norm_eps)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logits(self, features_LD: Tensor) -> Tensor:
        """-> float32 [L, vocab]. Every rank of a group that shares the head calls it in each step."""
        return self.head(features_LD)

    def _backbone(self, token_ids: Tensor, state: StateViews, context: ForwardContext) -> Tensor:
        """-> streams [T, S, D] after the last layer."""
        config, settings = self.config, self._hyper
        streams = self.embed.value[token_ids][:, None].expand(-1, config.hc_mult, -1).contiguous()
        output: Tensor | None = None
        mix: Mix | None = None
        for layer, layer_state in zip(self.layers, state.layers[: config.num_hidden_layers], strict=True):
            for connection, norm, sublayer in layer.sublayers():
                weights = connection.weights
                if output is None or mix is None:
                    x, mix = hyper_pre(streams, weights, norm.value, settings, quantize=self._packed)
                else:
                    streams, x, mix = hyper_post_pre(
                        output, streams, mix, weights, norm.value, settings, quantize=self._packed
                    )
                output = sublayer(x, layer_state, context)
        assert output is not None
        assert mix is not None
        return hyper_post(output, streams, mix)
