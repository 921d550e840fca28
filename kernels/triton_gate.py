"""Expert choice from router logits (specification: kernels.moe.route_by_score_ref and route_by_token_ref).

T tokens, V token ids, E experts, K choices. score = sqrt(softplus(logit)), softplus as log1p(exp(g)) up to g = 20 and g
above; the K largest of score + bias, ties to the lower expert, or those given for the token's id; weights = score / sum
of scores * scale, without the bias. The router's product stays a float32 matrix product outside. A warp a token,
everything in registers; bound by latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _score(logits):
    """log1p(exp(g)) = g + log(1 + exp(-g)) above zero: neither branch overflows, and small ones keep their digits."""
    small = tl.exp(tl.minimum(logits, 0.0))
    series = small * (1.0 - small * (0.5 - small * (0.33333334 - small * 0.25)))
    below = tl.where(small < 0.01, series, tl.log(1.0 + small))
    above = logits + tl.log(1.0 + tl.exp(-tl.maximum(logits, 0.0)))
    return tl.sqrt(tl.where(logits > 20.0, logits, tl.where(logits > 0.0, above, below)))


@triton.jit
def _pick_kernel(
    logits, bias, given, token_ids, real, experts, weights, num_experts, scale, nowhere, stride_logits,
    CHOICES: tl.constexpr, EXPERTS: tl.constexpr, GIVEN: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    score = _score(tl.load(logits + token * stride_logits + expert, mask=inside, other=0.0))
    ranked = score
    if not GIVEN:
        ranked = tl.where(inside, score + tl.load(bias + expert, mask=inside, other=0.0), float("-inf"))
    first = given
    if GIVEN:
        first = given + tl.load(token_ids + token).to(tl.int64) * CHOICES
    total = 0.0
    for choice in tl.static_range(CHOICES):
        if GIVEN:
            picked = tl.load(first + choice).to(tl.int32)
        else:
            picked = tl.min(tl.where(ranked == tl.max(ranked, axis=0), expert, EXPERTS), axis=0)
            ranked = tl.where(expert == picked, float("-inf"), ranked)
        value = tl.sum(tl.where(expert == picked, score, 0.0), axis=0)
        total += value
        target = picked.to(tl.int64)
        if PADDED:
            target = tl.where(tl.load(real + token) != 0, target, nowhere)
        tl.store(experts + token * CHOICES + choice, target)
        tl.store(weights + token * CHOICES + choice, value)
    tl.debug_barrier()
    slot = tl.arange(0, triton.next_power_of_2(CHOICES))
    place = weights + token * CHOICES + slot
    value = tl.load(place, mask=slot < CHOICES, other=0.0)
    tl.store(place, value / (total + 1e-20) * scale, mask=slot < CHOICES)


def pick_experts(
    logits_TE: Tensor, topk: int, scale: float, *, bias_E: Tensor | None = None, given_VK: Tensor | None = None,
    token_ids_T: Tensor | None = None, real_T: Tensor | None = None, nowhere: int = -1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits float32 [T, E]; bias float32 [E], or given int [V, K] and token ids int [T]; real bool [T], None: all are
    -> experts int64 [T, K], `nowhere` for rows that are not real, weights float32 [T, K]."""
    if (bias_E is None) == (given_VK is None or token_ids_T is None):
        raise ValueError("experts are picked by score, with a bias, or given: exactly one of the two")
    num_tokens, num_experts = logits_TE.shape
    experts = torch.empty(num_tokens, topk, dtype=torch.int64, device=logits_TE.device)
    weights = torch.empty(num_tokens, topk, dtype=torch.float32, device=logits_TE.device)
    if num_tokens:
        _pick_kernel[(num_tokens,)](
            logits_TE, logits_TE if bias_E is None else bias_E, experts if given_VK is None else given_VK,
            experts if token_ids_T is None else token_ids_T, experts if real_T is None else real_T.view(torch.uint8),
            experts, weights, num_experts, scale, nowhere, logits_TE.stride(0), CHOICES=topk,
            EXPERTS=triton.next_power_of_2(num_experts), GIVEN=given_VK is not None, PADDED=real_T is not None,
            num_warps=1,
        )  # fmt: skip
    return experts, weights
