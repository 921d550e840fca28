"""Mixture of experts: routing by score or by token id, and the routed experts' SwiGLU.

T tokens, D hidden, E experts, I expert width, K experts a token. Routing in float32: score = sqrt(softplus(x gate^T)),
softplus as log1p(exp(g)) up to g = 20 and g above; taken are the K largest of score + bias (ties to the lower expert)
or the token's fixed experts; weights = score / sum of scores * scale, without the bias.
Expert: a = min(x w1^T, limit), u = clamp(x w3^T, -limit, limit), y = (silu(a) u weight) w2^T; the sum over a token's
experts is float32. Source: DeepSeek-V4's released program. Bound by the reads of expert weights at decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import use_triton
from kernels.exchange_rows import QuantizedTokens
from kernels.quantize import QuantizedRows, dequantize_fp4, simulate_fp8
from kernels.row_linear import row_linear
from kernels.wide_linear import wide_linear

if TYPE_CHECKING:
    from kernels.packed_experts import PackedBank

ACTIVATION_BLOCK = 128
WEIGHT_GROUP = 32


class ExpertWeights(NamedTuple):
    """Experts [first, first + E) in the activation dtype, or packed FP4 with scales (uint8, K / 2 bytes a row)."""

    first: int
    w13: Tensor
    """[E, 2 I, D]: gate rows, then up rows."""
    w2: Tensor
    """[E, D, I]."""
    w13_scale: Tensor | None = None
    """uint8 E8M0 [E, 2 I, D / 32]."""
    w2_scale: Tensor | None = None
    """uint8 E8M0 [E, D, I / 32]."""


def _scores(x_TD: Tensor, gate_ED: Tensor) -> Tensor:
    logits = row_linear(x_TD.float(), gate_ED)
    return torch.where(logits > 20, logits, logits.exp().log1p()).sqrt()


def _weights(scores_TE: Tensor, experts_TK: Tensor, scale: float) -> Tensor:
    picked = scores_TE.gather(1, experts_TK)
    return picked / (picked.sum(-1, keepdim=True) + 1e-20) * scale


def route_by_score_ref(x_TD: Tensor, gate_ED: Tensor, bias_E: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(x_TD, gate_ED)
    experts = (scores + bias_E).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    return experts, _weights(scores, experts, scale)


def route_by_token_ref(
    x_TD: Tensor, gate_ED: Tensor, experts_VK: Tensor, token_ids_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    experts = experts_VK[token_ids_T].long()
    return experts, _weights(_scores(x_TD, gate_ED), experts, scale)


def swiglu_ref(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU in float32, [..., I]."""
    return functional.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


def _matrix(packed: Tensor, scale: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return packed[expert]
    return dequantize_fp4(packed[expert], scale[expert], WEIGHT_GROUP).to(dtype)


def routed_experts_ref(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, local: ExpertWeights, *, limit: float, simulate: bool
) -> Tensor:
    first, num_local = local.first, local.w13.shape[0]
    num_tokens, topk = experts_TK.shape
    order = experts_TK.flatten().sort(stable=True)  # assignments by expert, then by token
    counts = torch.bincount(order.values, minlength=first + num_local).tolist()
    begin = sum(counts[:first])
    counts = counts[first : first + num_local]
    mine = order.indices[begin : begin + sum(counts)]
    x = (simulate_fp8(x_TD, ACTIVATION_BLOCK) if simulate else x_TD)[mine // topk]
    gate, up = _by_expert(x, counts, local.w13, local.w13_scale).chunk(2, -1)
    hidden = (swiglu_ref(gate, up, limit) * weights_TK.flatten()[mine, None]).to(x_TD.dtype)
    if simulate:
        hidden = simulate_fp8(hidden, ACTIVATION_BLOCK)
    outputs = x_TD.new_zeros(num_tokens * topk, x_TD.shape[1], dtype=torch.float32)
    outputs[mine] = _by_expert(hidden, counts, local.w2, local.w2_scale).float()
    return outputs.unflatten(0, (num_tokens, topk)).sum(1)


def _by_expert(rows: Tensor, counts: list[int], weight: Tensor, scale: Tensor | None) -> Tensor:
    """Consecutive runs of `rows`, counts[e] of them through expert e."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append(row_linear(rows[start : start + count], _matrix(weight, scale, expert, rows.dtype)))
            start += count
    return torch.cat(parts) if parts else rows.new_empty(0, weight.shape[1])


def _without_padding(routing: tuple[Tensor, Tensor], real_T: Tensor | None, nowhere: int) -> tuple[Tensor, Tensor]:
    if real_T is None:
        return routing
    return routing[0].masked_fill(~real_T[:, None], nowhere), routing[1]


def route_by_score(
    x_TD: Tensor, gate_ED: Tensor, bias_E: Tensor, topk: int, scale: float, *, real_T: Tensor | None = None,
    nowhere: int = -1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> experts int64 [T, K], weights float32 [T, K]. Rows that are not real (bool [T], None: all are) go to
    the expert `nowhere`."""
    if use_triton(x_TD):
        from kernels.triton_gate import pick_experts

        logits = wide_linear(x_TD, gate_ED)
        return pick_experts(logits, topk, scale, bias_E=bias_E, real_T=real_T, nowhere=nowhere)
    return _without_padding(route_by_score_ref(x_TD, gate_ED, bias_E, topk, scale), real_T, nowhere)


def route_by_token(
    x_TD: Tensor, gate_ED: Tensor, experts_VK: Tensor, token_ids_T: Tensor, scale: float, *,
    real_T: Tensor | None = None, nowhere: int = -1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """experts_VK int [V, K]: the fixed experts of each token id. -> as route_by_score."""
    if use_triton(x_TD):
        from kernels.triton_gate import pick_experts

        return pick_experts(
            wide_linear(x_TD, gate_ED), experts_VK.shape[1], scale, given_VK=experts_VK, token_ids_T=token_ids_T,
            real_T=real_T, nowhere=nowhere,
        )  # fmt: skip
    return _without_padding(route_by_token_ref(x_TD, gate_ED, experts_VK, token_ids_T, scale), real_T, nowhere)


def swiglu(gate: Tensor, up: Tensor, limit: float, *, quantize: bool = False) -> Tensor | QuantizedRows:
    """[T, I] -> [T, I], rounded once to the inputs' dtype; with `quantize` its e4m3 form instead, where that costs no
    pass of its own."""
    if use_triton(gate):
        from kernels.triton_swiglu import swiglu_quantized_triton, swiglu_triton

        if quantize and gate.dtype == torch.bfloat16 and gate.shape[1] % ACTIVATION_BLOCK == 0:
            return swiglu_quantized_triton(gate, up, limit)
        return swiglu_triton(gate, up, limit, gate.dtype)
    return swiglu_ref(gate, up, limit).to(gate.dtype)


def routed_experts(
    x_TD: Tensor | QuantizedTokens,
    experts_TK: Tensor,
    weights_TK: Tensor,
    local: ExpertWeights | PackedBank,
    *,
    limit: float,
    simulate: bool,
    num_experts: int | None = None,
    shared_TD: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sum over the local experts of those each token chose: [T, D] in `dtype`, float32 or bfloat16; or with the shared
    expert's output added, in that one's dtype. Added in float32 and rounded once.

    `simulate` rounds the inputs of both products to e4m3 in blocks of 128, as the released program does.
    `num_experts`: among how many the tokens chose, here and elsewhere; None: the local ones. Changes speed only.
    """
    if use_triton(weights_TK) and _fits_gpu(x_TD, local, simulate):
        from kernels.gpu_experts import block_rows_for, routed_experts_gpu

        total = num_experts or (local.w13.shape[0] if isinstance(local, ExpertWeights) else local.up.data.shape[0])
        rows = block_rows_for(x_TD.shape[0], experts_TK.shape[1], total)
        return routed_experts_gpu(
            x_TD, experts_TK, weights_TK, local, limit=limit, block_rows=rows, shared_TD=shared_TD, dtype=dtype
        )
    if not isinstance(local, ExpertWeights):
        raise ValueError(f"packed experts need bfloat16 rows and the released rounding, not {x_TD.dtype}")
    x = x_TD if isinstance(x_TD, Tensor) else x_TD.values()
    routed = routed_experts_ref(x, experts_TK, weights_TK, local, limit=limit, simulate=simulate)
    return routed.to(dtype) if shared_TD is None else (routed + shared_TD).to(shared_TD.dtype)


def _fits_gpu(x_TD: Tensor | QuantizedTokens, local: ExpertWeights | PackedBank, simulate: bool) -> bool:
    """The kernels know packed experts of whole blocks of 128 and the released rounding of inputs."""
    if not simulate or x_TD.dtype != torch.bfloat16:
        return False
    if not isinstance(local, ExpertWeights):
        return bool(local.up.data.is_cuda)
    blocks = x_TD.shape[1] % ACTIVATION_BLOCK == 0 and local.w13.shape[1] // 2 % ACTIVATION_BLOCK == 0
    return bool(local.w13_scale is not None and blocks)
