"""Manifold-constrained hyper-connections: a layer reads a mix of S residual streams and writes back to all of them.

T tokens, S streams (4), D hidden. streams [T, S, D] activation dtype; fn [(2 + S) S, S D], base and scale [(2 + S) S]
float32 (the checkpoint's three scales, repeated S, S and S S times at load). All arithmetic in float32, one rounding at
each output. Source: DeepSeek-V4's released program (mHC).

    mix  = (v fn^T) * rsqrt(mean(v^2) + eps), v = streams flattened over S and D
    a, b, c = mix * scale + base split at S and 2 S
    pre  = sigmoid(a) + hc_eps              weights of the sublayer's input
    post = 2 sigmoid(b)                     weights of the sublayer's output
    comb = sinkhorn(c)   [S from, S to]     stream-to-stream weights, nearly doubly stochastic
    input = norm(sum_i pre[i] streams[i]);  streams'[j] = post[j] output + sum_i comb[i, j] streams[i]

Bound by memory: reads streams once for pre, reads and writes them once for post; fused, the second read goes away.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from kernels.activations import Activations
from kernels.dispatch import use_triton
from kernels.rms_norm import inverse_rms, rms_norm_ref
from kernels.row_linear import row_linear


class HyperWeights(NamedTuple):
    """Parameters of one sublayer's connection, float32."""

    fn: Tensor
    base: Tensor
    scale: Tensor


class HyperSettings(NamedTuple):
    """Constants of a model's connections."""

    iterations: int
    """Column normalisations of the Sinkhorn projection."""
    hc_eps: float
    norm_eps: float


class Mix(NamedTuple):
    """How a sublayer's output returns to the streams, float32."""

    post_TS: Tensor
    comb_TSS: Tensor


def sinkhorn_ref(logits_TSS: Tensor, iterations: int, eps: float) -> Tensor:
    """Row softmax, then alternating column and row normalisations; `iterations` column steps, the last step is one."""
    m = logits_TSS.softmax(-1) + eps
    m /= m.sum(-2, keepdim=True) + eps
    for _ in range(iterations - 1):
        m /= m.sum(-1, keepdim=True) + eps
        m /= m.sum(-2, keepdim=True) + eps
    return m


def _sinkhorn_cpu(logits_TSS: Tensor, iterations: int, eps: float) -> Tensor:
    """The same steps through NumPy, whose calls on a few numbers cost a third of torch's: this would otherwise be the
    dearest op of a CPU decode step. Tokens are the innermost dimension and at least two, which keeps the order of a
    token's sums, and so its bits, the same in every batch."""
    num_tokens = logits_TSS.shape[0]
    start = logits_TSS.softmax(-1)
    if num_tokens == 1:
        start = start.expand(2, -1, -1)
    m = start.permute(1, 2, 0).contiguous().numpy()  # [from, to, T]
    epsilon = m.dtype.type(eps)
    columns, rows = numpy.empty_like(m[:1]), numpy.empty_like(m[:, :1])
    total, divide = numpy.add.reduce, numpy.divide
    numpy.add(m, epsilon, m)
    for step in range(iterations):
        if step:
            total(m, 1, out=rows, keepdims=True, initial=epsilon)
            divide(m, rows, m)
        total(m, 0, out=columns, keepdims=True, initial=epsilon)
        divide(m, columns, m)
    return torch.from_numpy(m).permute(2, 0, 1)[:num_tokens]


def sinkhorn(logits_TSS: Tensor, iterations: int, eps: float) -> Tensor:
    """float32 [T, S, S] -> float32 [T, S, S]."""
    return (
        sinkhorn_ref(logits_TSS, iterations, eps) if logits_TSS.is_cuda else _sinkhorn_cpu(logits_TSS, iterations, eps)
    )


def _project(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    v = streams.flatten(1).float()
    return row_linear(v, fn).mul_(inverse_rms(v, eps))


def _sigmoid(x: Tensor) -> Tensor:
    # torch's own rounds differently in the last few elements of a buffer than in the rest, its exp does not.
    return x.neg().exp_().add_(1.0).reciprocal_()


def _weighted_sum(weights_TS: Tensor, streams: Tensor) -> Tensor:
    return torch.bmm(weights_TS[:, None], streams.float())[:, 0].to(streams.dtype)


def hyper_pre_ref(
    streams: Tensor, weights: HyperWeights, norm_weight: Tensor, settings: HyperSettings
) -> tuple[Tensor, Mix]:
    """-> (normed sublayer input [T, D] activation dtype, how to write back)."""
    num = streams.shape[1]
    mix = torch.addcmul(weights.base, _project(streams, weights.fn, settings.norm_eps), weights.scale)
    gates = _sigmoid(mix[:, : 2 * num])
    pre, post = gates[:, :num] + settings.hc_eps, 2 * gates[:, num:]
    comb = sinkhorn(mix[:, 2 * num :].unflatten(1, (num, num)), settings.iterations, settings.hc_eps)
    return rms_norm_ref(_weighted_sum(pre, streams), norm_weight, settings.norm_eps), Mix(post, comb)


def hyper_post_ref(output: Tensor, streams: Tensor, mix: Mix) -> Tensor:
    """output [T, D], streams [T, S, D] -> streams [T, S, D]."""
    written = mix.post_TS[..., None] * output.float()[:, None]
    return torch.baddbmm(written, mix.comb_TSS.mT, streams.float()).to(streams.dtype)


def hyper_head_ref(streams: Tensor, weights: HyperWeights, settings: HyperSettings) -> Tensor:
    """Collapses the streams before the final norm: fn [S, S D], base [S], scale [1] -> [T, D] activation dtype."""
    mix = _project(streams, weights.fn, settings.norm_eps) * weights.scale + weights.base
    return _weighted_sum(_sigmoid(mix) + settings.hc_eps, streams)


def _fits_triton(streams: Tensor) -> bool:
    """The kernels know four bf16 streams of whole blocks of 128 channels."""
    fits = streams.dtype == torch.bfloat16 and streams.shape[1] == 4 and streams.shape[2] % 128 == 0
    return bool(fits) and use_triton(streams)


def _fits_hopper(streams: Tensor, weights: HyperWeights) -> bool:
    """Two launches for all of it, one that writes back and one that makes the input."""
    if not streams.is_cuda:
        return False
    from kernels.gpu_hyper_connection import fits

    return fits(streams, weights)


def hyper_pre(
    streams: Tensor, weights: HyperWeights, norm_weight: Tensor, settings: HyperSettings, *, quantize: bool = False
) -> tuple[Activations, Mix]:
    """quantize: make the input's e4m3 form too, where that costs little; others leave it to the products."""
    if _fits_hopper(streams, weights):
        from kernels.gpu_hyper_connection import hyper_pre_gpu

        return hyper_pre_gpu(streams, weights, norm_weight, settings, quantize=quantize)
    if _fits_triton(streams):
        from kernels.triton_hyper_connection import hyper_pre_triton

        inputs, mix = hyper_pre_triton(streams, weights, norm_weight, settings)
    else:
        inputs, mix = hyper_pre_ref(streams, weights, norm_weight, settings)
    return Activations(inputs), mix


def hyper_post(output: Tensor, streams: Tensor, mix: Mix) -> Tensor:
    if _fits_triton(streams):
        from kernels.triton_hyper_connection import hyper_post_triton

        return hyper_post_triton(output, streams, mix)
    return hyper_post_ref(output, streams, mix)


def hyper_post_pre(
    output: Tensor,
    streams: Tensor,
    mix: Mix,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    *,
    quantize: bool = False,
) -> tuple[Tensor, Activations, Mix]:
    """The seam between two sublayers: writes one's output back and reads the next one's input; `quantize` as above.

    -> (streams, normed input, mix of the next sublayer)."""
    if _fits_hopper(streams, weights):
        from kernels.gpu_hyper_connection import hyper_post_pre_gpu

        return hyper_post_pre_gpu(output, streams, mix, weights, norm_weight, settings, quantize=quantize)
    streams = hyper_post(output, streams, mix)
    inputs, following = hyper_pre(streams, weights, norm_weight, settings)
    return streams, inputs, following


def hyper_head(streams: Tensor, weights: HyperWeights, settings: HyperSettings) -> Tensor:
    if _fits_triton(streams):
        from kernels.triton_hyper_connection import hyper_head_triton

        return hyper_head_triton(streams, weights, settings)
    return hyper_head_ref(streams, weights, settings)
