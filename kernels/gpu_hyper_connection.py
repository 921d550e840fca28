"""Hyper-connections on Hopper GPUs in one launch (kernels/cuda/hyper_seam.cu).

T tokens, S = 4 streams, D hidden (a multiple of 1024, at most 8192), streams bf16.
"""

from __future__ import annotations

from ctypes import c_float, c_int64
from functools import lru_cache

import torch
from torch import Tensor

from kernels import cuda_build
from kernels.hyper_connection import HyperSettings, HyperWeights, Mix
from kernels.triton_quantize import QuantizedRows, scale_stride

STREAMS, MIXES = 4, 24
GROUP = 128
"""Channels that share a scale."""
_TILES = ((128, 1), (256, 2))
"""(most tokens, tiles of eight a cluster takes); beyond, three, the most of which two CTAs fit a multiprocessor."""


class Seam:
    """What one launch makes."""

    def __init__(self, streams: Tensor, quantize: bool) -> None:
        """streams [T, 4, D]: decides shapes and device."""
        num_tokens, _, hidden = streams.shape
        device = streams.device
        self.inputs = torch.empty(num_tokens, hidden, dtype=streams.dtype, device=device)
        self.mix = Mix(
            torch.empty(num_tokens, STREAMS, dtype=torch.float32, device=device),
            torch.empty(num_tokens, STREAMS, STREAMS, dtype=torch.float32, device=device),
        )
        self.quantized: QuantizedRows | None = None
        if quantize:
            self.quantized = QuantizedRows(
                torch.empty(num_tokens, hidden, dtype=torch.float8_e4m3fn, device=device),
                torch.empty(hidden // GROUP, scale_stride(num_tokens), dtype=torch.float32, device=device),
            )


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
    """pack_rows(fn), kept for as long as fn is."""
    key = (fn.data_ptr(), fn._version)
    kept = _packed.get(key)
    if kept is None or kept[0] is not fn:
        kept = _packed[key] = (fn, pack_rows(fn))
    return kept[1]


def tiles_for(num_tokens: int) -> int:
    """Tiles of eight tokens that a cluster takes: few, until every multiprocessor has work. Changes speed only."""
    return next((tiles for most, tiles in _TILES if num_tokens <= most), 3)


def _launch(
    seam: Seam,
    output: Tensor | None,
    streams: Tensor,
    mix: Mix | None,
    new: Tensor | None,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    tiles: int | None,
) -> None:
    library = cuda_build.load("hyper_seam")
    num_tokens, _, hidden = streams.shape
    codes, scales = seam.quantized if seam.quantized is not None else (None, None)
    at = cuda_build.address
    error = library.hyper_seam(
        at(output), at(streams), at(mix.post_TS if mix else None), at(mix.comb_TSS if mix else None),
        at(_packed_rows(weights.fn)), at(weights.scale), at(weights.base), at(norm_weight), at(new), at(seam.inputs),
        at(codes), at(scales), at(seam.mix.post_TS), at(seam.mix.comb_TSS),
        c_int64(0 if scales is None else scales.stride(0)), num_tokens, hidden, settings.iterations,
        c_float(settings.hc_eps), c_float(settings.norm_eps), tiles or tiles_for(num_tokens),
        cuda_build.stream(streams.device),
    )  # fmt: skip
    cuda_build.check(error, f"hyper_seam({num_tokens} tokens of {hidden} channels)")


def hyper_pre_gpu(
    streams: Tensor,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    *,
    quantize: bool = False,
    tiles: int | None = None,
) -> Seam:
    """kernels.hyper_connection.hyper_pre; with `quantize` also the input's e4m3 rows."""
    seam = Seam(streams, quantize)
    _launch(seam, None, streams, None, None, weights, norm_weight, settings, tiles)
    return seam


def hyper_post_pre_gpu(
    output: Tensor,
    streams: Tensor,
    mix: Mix,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
    *,
    quantize: bool = False,
    tiles: int | None = None,
) -> tuple[Tensor, Seam]:
    """kernels.hyper_connection.hyper_post_pre; with `quantize` also the input's e4m3 rows."""
    seam, new = Seam(streams, quantize), torch.empty_like(streams)
    _launch(seam, output.contiguous(), streams, mix, new, weights, norm_weight, settings, tiles)
    return new, seam
