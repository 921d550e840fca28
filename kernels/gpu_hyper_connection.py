"""Hyper-connections on Hopper GPUs in one launch (kernels/cuda/hyper_seam.cu).

T tokens, S = 4 streams, D hidden (a multiple of 1024, at most 8192), streams bf16.
"""

from __future__ import annotations

from ctypes import c_float, c_int64
from functools import lru_cache

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.activations import Activations
from kernels.hyper_connection import HyperSettings, HyperWeights, Mix, MixLogits
from kernels.quantize import QuantizedRows
from kernels.triton_quantize import scale_stride

STREAMS, MIXES = 4, 24
LOGITS = MIXES - STREAMS
GROUP = 128
"""Channels that share a scale."""
FEW_TOKENS = 128
"""Up to here a cluster takes eight tokens, beyond sixteen: then fn is read half as often."""


def fits(streams: Tensor, weights: HyperWeights) -> bool:
    """Whether this machine and the kernel know such streams."""
    shape = streams.dim() == 3 and streams.shape[1] == STREAMS and weights.fn.shape[0] == MIXES
    hidden = streams.shape[-1]
    return shape and streams.dtype == torch.bfloat16 and hidden % 1024 == 0 and hidden <= 8192 and _available()


@lru_cache(maxsize=1)
def _available() -> bool:
    try:
        cuda_build.load("hyper_seam")
    except cuda_build.CudaUnavailable:
        return False
    return True


def pack_rows(fn: Tensor) -> Tensor:
    """fn float32 [24, 4 D] -> bf16 [D / 32, 4 streams, 3, 2, 32 lanes, 8]: in the order in which the lanes of a warp
    hold the left operand of a 16 x 16 x 8 product.

    Row r < 8 of product t is column 8 t + r of the mix, rounded; row 8 + r is what rounding left of it."""
    blocks = fn.shape[1] // STREAMS // 32
    high = fn.bfloat16()
    halves = torch.stack((high, (fn - high.float()).bfloat16()))
    # [half, product, row, stream, block, lane of four, step, pair, channel]; a lane has eight neighbouring channels.
    parts = halves.view(2, 3, 8, STREAMS, blocks, 4, 2, 2, 2)
    return parts.permute(4, 3, 1, 6, 2, 5, 7, 0, 8).reshape(blocks, STREAMS, 3, 2, 32, 8).contiguous()


_packed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _packed_rows(fn: Tensor) -> Tensor:
    """pack_rows(fn), kept with fn: captured steps hold its address."""
    key = (id(fn), fn._version)
    if key not in _packed:
        _packed[key] = (fn, pack_rows(fn))
    return _packed[key][1]


def tiles_for(num_tokens: int) -> int:
    """Tiles of eight tokens that a cluster takes. Changes speed only."""
    return 1 if num_tokens <= FEW_TOKENS else 2


def _launch(
    output: Tensor | None,
    streams: Tensor,
    mix: MixLogits | None,
    new: Tensor | None,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    quantize: bool,
    tiles: int | None,
) -> tuple[Activations, MixLogits]:
    library = cuda_build.load("hyper_seam")
    (num_tokens, _, hidden), device = streams.shape, streams.device
    inputs = torch.empty(num_tokens, hidden, dtype=streams.dtype, device=device)
    following = torch.empty(num_tokens, LOGITS, dtype=torch.float32, device=device)
    codes = scales = quantized = None
    if quantize:
        codes = torch.empty(num_tokens, hidden, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(hidden // GROUP, scale_stride(num_tokens), dtype=torch.float32, device=device)
        quantized = QuantizedRows(codes, scales)
    at = cuda_build.address
    error = library.hyper_seam(
        at(output), at(streams), at(mix.values if mix else None), at(_packed_rows(weights.fn)), at(weights.scale),
        at(weights.base), at(norm_weight), at(new), at(inputs), at(codes), at(scales), at(following),
        c_int64(0 if scales is None else scales.stride(0)), num_tokens, hidden, settings.iterations,
        c_float(settings.hc_eps), c_float(settings.norm_eps), tiles or tiles_for(num_tokens),
        cuda_build.stream(device),
    )  # fmt: skip
    cuda_build.check(error, f"hyper_seam({num_tokens} tokens of {hidden} channels)")
    return Activations(inputs, quantized), MixLogits(following)


def hyper_pre_gpu(
    streams: Tensor,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    *,
    quantize: bool = False,
    tiles: int | None = None,
) -> tuple[Activations, MixLogits]:
    """kernels.hyper_connection.hyper_pre."""
    return _launch(None, streams, None, None, weights, norm_weight, settings, quantize, tiles)


def hyper_post_pre_gpu(
    output: Tensor,
    streams: Tensor,
    mix: MixLogits,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    *,
    quantize: bool = False,
    tiles: int | None = None,
) -> tuple[Tensor, Activations, MixLogits]:
    """kernels.hyper_connection.hyper_post_pre."""
    new = torch.empty_like(streams)
    inputs, following = _launch(output.contiguous(), streams, mix, new, weights, norm_weight, settings, quantize, tiles)
    return new, inputs, following


def mix_of_logits(mix: MixLogits, settings: HyperSettings) -> Mix:
    """Gates and Sinkhorn, for whoever writes back without a seam."""
    num_tokens, device = mix.values.shape[0], mix.values.device
    post = torch.empty(num_tokens, STREAMS, dtype=torch.float32, device=device)
    comb = torch.empty(num_tokens, STREAMS, STREAMS, dtype=torch.float32, device=device)
    at = cuda_build.address
    error = cuda_build.load("hyper_seam").hyper_mix_of_logits(
        at(mix.values), at(post), at(comb), num_tokens, settings.iterations, c_float(settings.hc_eps),
        cuda_build.stream(device),
    )  # fmt: skip
    cuda_build.check(error, f"hyper_mix_of_logits({num_tokens} tokens)")
    return Mix(post, comb)
