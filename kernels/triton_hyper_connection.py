"""Hyper-connections in four launches (specification: kernels.hyper_connection).

T tokens, S = 4 streams, D hidden (a multiple of 128), streams bf16. The seam between two sublayers, post then pre:

1. The new streams, elementwise.
2. Their product with fn on the tensor cores, split over features, and the square sum. Streams are exact in bf16 and fn
   goes in as two bf16 halves beside each other, so the product is good to 2^-17 of each term, better than tf32. Not
   software-pipelined: where something beside a product reads its operand, Triton 3.6 keeps a buffer too few of it, and
   the next copy overtakes the product.
3. A program per token adds the parts, forms the four input weights and the normed input.
4. A warp per 32 tokens runs Sinkhorn, one token a lane, all sixteen numbers in registers.

Sums run in an order that the number of features decides alone: a token's results depend neither on timing nor on the
tokens beside it.
Bound by memory: at decode all but the first launch find the streams in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hyper_connection import HyperSettings, HyperWeights, Mix
from kernels.triton_common import INTERPRET, dot_operand, reciprocal, sigmoid, to_bf16

STREAMS = 4
CHANNELS = 128
COLUMNS = 32
"""Width of a partial product: 24 mixes (or 4), then the square sum, then nothing."""
PROJECT_TOKENS = 64
"""Of a program of the product. The same for few tokens, for which the tensor cores might add in another order."""
MOST_SLICES = 32
"""Of the features. More would occupy more multiprocessors with few tokens, and write more parts with many."""
MIX_TOKENS = 32


@triton.jit
def _post_kernel(output, streams, post, comb, new_streams, hidden, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < hidden
    place = token * 4 * hidden + channel
    x0 = tl.load(streams + place, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(streams + place + hidden, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(streams + place + 2 * hidden, mask=inside, other=0.0).to(tl.float32)
    x3 = tl.load(streams + place + 3 * hidden, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(output + token * hidden + channel, mask=inside, other=0.0).to(tl.float32)
    for target in tl.static_range(4):
        row = comb + token * 16 + target
        mixed = tl.load(post + token * 4 + target) * o
        mixed += tl.load(row) * x0
        mixed += tl.load(row + 4) * x1
        mixed += tl.load(row + 8) * x2
        mixed += tl.load(row + 12) * x3
        tl.store(new_streams + place + target * hidden, to_bf16(mixed, INTERPRET), mask=inside)


@triton.jit
def _project_kernel(
    streams, halves, parts, num_tokens, features, steps,
    NUM: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    live = token < num_tokens
    part = tl.program_id(1)
    column, both, inner = tl.arange(0, COLUMNS), tl.arange(0, 2 * COLUMNS), tl.arange(0, FEATURES)
    products = tl.zeros((TOKENS, 2 * COLUMNS), tl.float32)
    square = tl.zeros((TOKENS,), tl.float32)
    for step in range(steps):
        feature = (part * steps + step) * FEATURES + inner
        stream = tl.load(streams + token[:, None] * features + feature[None, :], mask=live[:, None], other=0.0)
        half = tl.load(halves + both[:, None] * features + feature[None, :])
        products = tl.dot(dot_operand(stream, INTERPRET), tl.trans(dot_operand(half, INTERPRET)), products)
        wide = stream.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    product = tl.sum(tl.reshape(products, (TOKENS, 2, COLUMNS)), axis=1)
    result = tl.where(column[None, :] == NUM, square[:, None], product)
    target_row = parts + (part.to(tl.int64) * num_tokens + token[:, None]) * COLUMNS + column[None, :]
    tl.store(target_row, result, mask=live[:, None])


@triton.jit
def _mix_column(sums, scale, base, column, token, live, factor, COLUMNS: tl.constexpr):
    """One mix of a block of tokens, scaled and shifted."""
    value = tl.load(sums + token * COLUMNS + column, mask=live, other=0.0)
    return value * factor * tl.load(scale + column) + tl.load(base + column)


@triton.jit
def _normalised(a, b, c, d, eps, INTERPRET: tl.constexpr):
    inverse = reciprocal(a + b + c + d + eps, INTERPRET)
    return a * inverse, b * inverse, c * inverse, d * inverse


@triton.jit
def _softmax(a, b, c, d, eps, INTERPRET: tl.constexpr):
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    inverse = reciprocal(a + b + c + d, INTERPRET)
    return a * inverse + eps, b * inverse + eps, c * inverse + eps, d * inverse + eps


@triton.jit
def _mix_kernel(
    sums, scale, base, post, comb, num_tokens, features, hc_eps, norm_eps, iterations,
    COLUMNS: tl.constexpr, MIX_TOKENS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * MIX_TOKENS + tl.arange(0, MIX_TOKENS)).to(tl.int64)
    live = token < num_tokens
    factor = tl.rsqrt(tl.load(sums + token * COLUMNS + 24, mask=live, other=1.0) / features + norm_eps)
    for stream in tl.static_range(4):
        value = _mix_column(sums, scale, base, 4 + stream, token, live, factor, COLUMNS)
        tl.store(post + token * 4 + stream, 2.0 * sigmoid(value), mask=live)
    m00 = _mix_column(sums, scale, base, 8, token, live, factor, COLUMNS)
    m01 = _mix_column(sums, scale, base, 9, token, live, factor, COLUMNS)
    m02 = _mix_column(sums, scale, base, 10, token, live, factor, COLUMNS)
    m03 = _mix_column(sums, scale, base, 11, token, live, factor, COLUMNS)
    m10 = _mix_column(sums, scale, base, 12, token, live, factor, COLUMNS)
    m11 = _mix_column(sums, scale, base, 13, token, live, factor, COLUMNS)
    m12 = _mix_column(sums, scale, base, 14, token, live, factor, COLUMNS)
    m13 = _mix_column(sums, scale, base, 15, token, live, factor, COLUMNS)
    m20 = _mix_column(sums, scale, base, 16, token, live, factor, COLUMNS)
    m21 = _mix_column(sums, scale, base, 17, token, live, factor, COLUMNS)
    m22 = _mix_column(sums, scale, base, 18, token, live, factor, COLUMNS)
    m23 = _mix_column(sums, scale, base, 19, token, live, factor, COLUMNS)
    m30 = _mix_column(sums, scale, base, 20, token, live, factor, COLUMNS)
    m31 = _mix_column(sums, scale, base, 21, token, live, factor, COLUMNS)
    m32 = _mix_column(sums, scale, base, 22, token, live, factor, COLUMNS)
    m33 = _mix_column(sums, scale, base, 23, token, live, factor, COLUMNS)
    m00, m01, m02, m03 = _softmax(m00, m01, m02, m03, hc_eps, INTERPRET)
    m10, m11, m12, m13 = _softmax(m10, m11, m12, m13, hc_eps, INTERPRET)
    m20, m21, m22, m23 = _softmax(m20, m21, m22, m23, hc_eps, INTERPRET)
    m30, m31, m32, m33 = _softmax(m30, m31, m32, m33, hc_eps, INTERPRET)
    for step in range(iterations):
        if step > 0:
            m00, m01, m02, m03 = _normalised(m00, m01, m02, m03, hc_eps, INTERPRET)
            m10, m11, m12, m13 = _normalised(m10, m11, m12, m13, hc_eps, INTERPRET)
            m20, m21, m22, m23 = _normalised(m20, m21, m22, m23, hc_eps, INTERPRET)
            m30, m31, m32, m33 = _normalised(m30, m31, m32, m33, hc_eps, INTERPRET)
        m00, m10, m20, m30 = _normalised(m00, m10, m20, m30, hc_eps, INTERPRET)
        m01, m11, m21, m31 = _normalised(m01, m11, m21, m31, hc_eps, INTERPRET)
        m02, m12, m22, m32 = _normalised(m02, m12, m22, m32, hc_eps, INTERPRET)
        m03, m13, m23, m33 = _normalised(m03, m13, m23, m33, hc_eps, INTERPRET)
    row = comb + token * 16
    tl.store(row, m00, mask=live)
    tl.store(row + 1, m01, mask=live)
    tl.store(row + 2, m02, mask=live)
    tl.store(row + 3, m03, mask=live)
    tl.store(row + 4, m10, mask=live)
    tl.store(row + 5, m11, mask=live)
    tl.store(row + 6, m12, mask=live)
    tl.store(row + 7, m13, mask=live)
    tl.store(row + 8, m20, mask=live)
    tl.store(row + 9, m21, mask=live)
    tl.store(row + 10, m22, mask=live)
    tl.store(row + 11, m23, mask=live)
    tl.store(row + 12, m30, mask=live)
    tl.store(row + 13, m31, mask=live)
    tl.store(row + 14, m32, mask=live)
    tl.store(row + 15, m33, mask=live)


@triton.jit
def _pre_kernel(
    streams, parts, sums, scale, base, norm_weight, inputs, num_tokens, hidden, num_parts, features, hc_eps, norm_eps,
    NUM: tl.constexpr, SCALES: tl.constexpr, NORM: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < hidden
    part, column = tl.arange(0, PARTS), tl.arange(0, COLUMNS)
    place = (part[:, None].to(tl.int64) * num_tokens + token) * COLUMNS + column[None, :]
    mixes = tl.sum(tl.load(parts + place, mask=(part < num_parts)[:, None], other=0.0), axis=0)
    if NORM:
        tl.store(sums + token * COLUMNS + column, mixes)
    factor = tl.rsqrt(tl.sum(tl.where(column == NUM, mixes, 0.0), axis=0) / features + norm_eps)
    total = tl.zeros((BLOCK,), tl.float32)
    for stream in tl.static_range(4):
        value = tl.sum(tl.where(column == stream, mixes, 0.0), axis=0) * factor
        value = value * tl.load(scale + (stream if SCALES else 0)) + tl.load(base + stream)
        x = tl.load(streams + (token * 4 + stream) * hidden + channel, mask=inside, other=0.0).to(tl.float32)
        total += (sigmoid(value) + hc_eps) * x
    collapsed = to_bf16(total, INTERPRET)
    if NORM:
        wide = collapsed.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + norm_eps)
        weight = tl.load(norm_weight + channel, mask=inside, other=0.0)
        collapsed = to_bf16(wide * inverse * weight, INTERPRET)
    tl.store(inputs + token * hidden + channel, collapsed, mask=inside)


_halves: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _halves_of(fn: Tensor) -> Tensor:
    """fn [n, F] float32 -> bf16 [2, COLUMNS, F]: rounded values, then what rounding left. Kept with fn: captured steps
    hold its address."""
    key = (id(fn), fn._version)
    if key not in _halves:
        high = fn.bfloat16()
        low = (fn - high.float()).bfloat16()
        padded = torch.zeros(2, COLUMNS, fn.shape[1], dtype=torch.bfloat16, device=fn.device)
        padded[0, : fn.shape[0]], padded[1, : fn.shape[0]] = high, low
        _halves[key] = (fn, padded)
    return _halves[key][1]


def _slices(features: int) -> int:
    """How many parts a product is summed in: never more, or others, because of the number of tokens."""
    slices = MOST_SLICES
    while features // CHANNELS % slices:
        slices //= 2
    return slices


def _check(streams: Tensor) -> None:
    if streams.shape[1] != STREAMS or streams.shape[2] % CHANNELS or streams.dtype != torch.bfloat16:
        raise ValueError(
            f"streams {tuple(streams.shape)} {streams.dtype}: the kernel needs bfloat16 [T, {STREAMS}, D], "
            f"D a multiple of {CHANNELS}"
        )


def _write(output: Tensor, streams: Tensor, mix: Mix) -> Tensor:
    """First launch: the new streams."""
    _check(streams)
    num_tokens, _, hidden = streams.shape
    new = torch.empty_like(streams)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(hidden))
        _post_kernel[(num_tokens, triton.cdiv(hidden, block))](
            output, streams, mix.post_TS, mix.comb_TSS, new, hidden, BLOCK=block, INTERPRET=INTERPRET, num_warps=4
        )
    return new


def _project(streams: Tensor, weights: HyperWeights) -> Tensor:
    """Second launch: partial products and square sums, float32 [slices, T, COLUMNS]."""
    _check(streams)
    num_tokens, features = streams.shape[0], streams.shape[1] * streams.shape[2]
    slices = _slices(features)
    parts = torch.empty(slices, num_tokens, COLUMNS, dtype=torch.float32, device=streams.device)
    if num_tokens:
        _project_kernel[(triton.cdiv(num_tokens, PROJECT_TOKENS), slices)](
            streams, _halves_of(weights.fn), parts, num_tokens, features, features // CHANNELS // slices,
            NUM=weights.fn.shape[0], TOKENS=PROJECT_TOKENS, FEATURES=CHANNELS, COLUMNS=COLUMNS, INTERPRET=INTERPRET,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return parts


def _finish(
    streams: Tensor, parts: Tensor, weights: HyperWeights, norm_weight: Tensor | None, settings: HyperSettings
) -> tuple[Tensor, Mix]:
    """Third and fourth launch; without a norm weight it only collapses the streams."""
    num_tokens, _, hidden = streams.shape
    device, with_mix = streams.device, norm_weight is not None
    inputs = torch.empty(num_tokens, hidden, dtype=streams.dtype, device=device)
    post = torch.empty(num_tokens if with_mix else 0, STREAMS, dtype=torch.float32, device=device)
    comb = torch.empty(num_tokens if with_mix else 0, STREAMS, STREAMS, dtype=torch.float32, device=device)
    sums = torch.empty(num_tokens if with_mix else 0, COLUMNS, dtype=torch.float32, device=device)
    if num_tokens:
        block = triton.next_power_of_2(hidden)
        _pre_kernel[(num_tokens,)](
            streams, parts, sums, weights.scale, weights.base, norm_weight if norm_weight is not None else parts,
            inputs, num_tokens, hidden, parts.shape[0], float(STREAMS * hidden), settings.hc_eps, settings.norm_eps,
            NUM=weights.fn.shape[0], SCALES=weights.scale.shape[0] > 1, NORM=with_mix, COLUMNS=COLUMNS,
            PARTS=triton.next_power_of_2(parts.shape[0]), BLOCK=block, INTERPRET=INTERPRET,
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        if with_mix:
            _mix_kernel[(triton.cdiv(num_tokens, MIX_TOKENS),)](
                sums, weights.scale, weights.base, post, comb, num_tokens, float(STREAMS * hidden), settings.hc_eps,
                settings.norm_eps, settings.iterations, COLUMNS=COLUMNS, MIX_TOKENS=MIX_TOKENS, INTERPRET=INTERPRET,
                num_warps=1,
            )  # fmt: skip
    return inputs, Mix(post, comb)


def hyper_pre_triton(
    streams: Tensor, weights: HyperWeights, norm_weight: Tensor, settings: HyperSettings
) -> tuple[Tensor, Mix]:
    """kernels.hyper_connection.hyper_pre."""
    return _finish(streams, _project(streams, weights), weights, norm_weight, settings)


def hyper_post_triton(output: Tensor, streams: Tensor, mix: Mix) -> Tensor:
    """kernels.hyper_connection.hyper_post."""
    return _write(output, streams, mix)


def hyper_post_pre_triton(
    output: Tensor,
    streams: Tensor,
    mix: Mix,
    weights: HyperWeights,
    norm_weight: Tensor,
    settings: HyperSettings,
) -> tuple[Tensor, Tensor, Mix]:
    """kernels.hyper_connection.hyper_post_pre."""
    new = _write(output, streams, mix)
    inputs, following = _finish(new, _project(new, weights), weights, norm_weight, settings)
    return new, inputs, following


def hyper_head_triton(streams: Tensor, weights: HyperWeights, settings: HyperSettings) -> Tensor:
    """kernels.hyper_connection.hyper_head."""
    return _finish(streams, _project(streams, weights), weights, None, settings)[0]
