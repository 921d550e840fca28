"""Hyper-connections on Hopper GPUs in two launches (kernels/cuda/hyper_seam.cu).

T tokens, S = 4 streams, D hidden (a multiple of 1024, at most 8192), streams bf16.
"""

from __future__ import annotations

from ctypes import c_float, c_int64
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.activations import Activations
from kernels.hyper_connection import HyperSettings, HyperWeights, Mix
from kernels.quantize import QuantizedRows
from kernels.triton_quantize import scale_stride

STREAMS, MIXES = 4, 24
GROUP = 128
"""Channels that share a scale."""
SLICE, PART_COLUMNS = 256, 32
"""Channels of a CTA, and floats of a token's sums over them."""


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


class Division(NamedTuple):
    """How the work is divided; changes speed only."""

    tiles: int
    """Of eight tokens, to a CTA that writes: 2 or 4."""
    chunks: int
    """Of eight channels, to a thread that reads: 1, up to 4,096 channels, or 2."""


def division_of(num_tokens: int, hidden: int) -> Division:
    """The fastest of those measured: docs/kernels.md."""
    return Division(2 if num_tokens <= 384 else 4, 1 if num_tokens <= 256 and hidden <= 4096 else 2)


def _launch(
    output: Tensor | None,
    streams: Tensor,
    mix: Mix | None,
    new: Tensor | None,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    quantize: bool,
    division: Division | None,
) -> tuple[Activations, Mix]:
    library = cuda_build.load("hyper_seam")
    (num_tokens, _, hidden), device = streams.shape, streams.device

    def floats(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=device)

    inputs = torch.empty(num_tokens, hidden, dtype=streams.dtype, device=device)
    following = Mix(floats(num_tokens, STREAMS), floats(num_tokens, STREAMS, STREAMS))
    parts = floats(num_tokens, hidden // SLICE, PART_COLUMNS)
    codes = scales = quantized = None
    if quantize:
        codes = torch.empty(num_tokens, hidden, dtype=torch.float8_e4m3fn, device=device)
        scales = floats(hidden // GROUP, scale_stride(num_tokens))
        quantized = QuantizedRows(codes, scales)
    at = cuda_build.address
    error = library.hyper_seam(
        at(output), at(streams), at(mix.post_TS if mix else None), at(mix.comb_TSS if mix else None),
        at(_packed_rows(weights.fn)), at(weights.scale), at(weights.base), at(norm_weight), at(new), at(inputs),
        at(codes), at(scales), at(following.post_TS), at(following.comb_TSS), at(parts),
        c_int64(0 if scales is None else scales.stride(0)), num_tokens, hidden, settings.iterations,
        c_float(settings.hc_eps), c_float(settings.norm_eps), *(division or division_of(num_tokens, hidden)),
        cuda_build.stream(device),
    )  # fmt: skip
    cuda_build.check(error, f"hyper_seam({num_tokens} tokens of {hidden} channels)")
    return Activations(inputs, quantized), following


def hyper_pre_gpu(
    streams: Tensor,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    *,
    quantize: bool = False,
    division: Division | None = None,
) -> tuple[Activations, Mix]:
    """kernels.hyper_connection.hyper_pre."""
    return _launch(None, streams, None, None, weights, norm_weight, settings, quantize, division)


def hyper_post_pre_gpu(
    output: Tensor,
    streams: Tensor,
    mix: Mix,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    *,
    quantize: bool = False,
    division: Division | None = None,
) -> tuple[Tensor, Activations, Mix]:
    """kernels.hyper_connection.hyper_post_pre."""
    new = torch.empty_like(streams)
    inputs, following = _launch(
        output.contiguous(), streams, mix, new, weights, norm_weight, settings, quantize, division
    )
    return new, inputs, following
