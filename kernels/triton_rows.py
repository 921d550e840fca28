"""Rows of pages and slots in Triton: what the kernels that make KV rows and index keys share, and a plain store.

A row is C float32 values in registers, C a power of two. Finishing a row is RMS norm with weight, rotation of the last
channels, each rounded to the activation dtype; storing it is packed_rows.store_rows: Hadamard rotation of index keys,
quantisation, and where the pool keeps plain values, the values that the quantisation leaves. Formats, byte order and
rounding are those of kernels.packed_rows; bytes are equal given equal rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.packed_rows import PackedRows
from kernels.triton_common import INTERPRET, exponent_byte, power_of_two_scale, to_bf16, to_e4m3

PLAIN, KV_FP8, KEY_MXFP4, KEY_FP8 = 0, 1, 2, 3
FORMATS = {"bf16": PLAIN, "f32": PLAIN, "kv_fp8": KV_FP8, "key_mxfp4": KEY_MXFP4, "key_fp8": KEY_FP8}


@triton.jit
def as_activation(x, BF16: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 rounded to the activation dtype, kept in float32."""
    return to_bf16(x, INTERPRET).to(tl.float32) if BF16 else x


@triton.jit
def rotate(x, cos, sin, token, ROPE: tl.constexpr, INVERSE: tl.constexpr):
    """x float32 [N, C], cos and sin of row `token` -> the last ROPE channels rotated. Plain channels get cos 1, sin 0,
    which is exact."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    pair = tl.arange(0, width // 2) - (width - ROPE) // 2
    rotary = pair >= 0
    c = tl.load(cos + token * (ROPE // 2) + pair, mask=rotary, other=1.0)[None, :]
    s = tl.load(sin + token * (ROPE // 2) + pair, mask=rotary, other=0.0)[None, :]
    if INVERSE:
        s = -s
    a, b = tl.split(tl.reshape(x, (rows, width // 2, 2)))
    return tl.reshape(tl.join(a * c - b * s, b * c + a * s), (rows, width))


@triton.jit
def finish_row(
    x, norm, eps, cos, sin, token, WIDTH: tl.constexpr, ROPE: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr
):
    """x float32 [WIDTH] of activation values -> norm, rotation."""
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps) * tl.load(norm + tl.arange(0, WIDTH))
    x = tl.reshape(as_activation(x, BF16, INTERPRET), (1, WIDTH))
    return as_activation(tl.reshape(rotate(x, cos, sin, token, ROPE, False), (WIDTH,)), BF16, INTERPRET)


@triton.jit
def fp8_codes(x, INTERPRET: tl.constexpr):
    """x float32 [G, N] -> e4m3 codes and a power-of-two scale per line."""
    scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(x), axis=1), 1e-4), 1.0 / 448.0)
    return to_e4m3(x * (1.0 / scale)[:, None], INTERPRET), scale


@triton.jit
def fp4_codes(x):
    """x float32 [G, 32] -> e2m1 codes int32 [G, 32] and a power-of-two scale per line; ties go to the even code."""
    scale = power_of_two_scale(tl.maximum(tl.max(tl.abs(x), axis=1), 7.052966104933725e-38), 1.0 / 6.0)
    scaled = x * (1.0 / scale)[:, None]
    a = tl.abs(scaled)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | ((scaled.to(tl.int32, bitcast=True) >> 28) & 8), scale


@triton.jit
def fp4_values(code):
    """e2m1 codes int32 -> float32. The code's bits in float32's exponent and mantissa are the value times 2^-126."""
    return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def simulate_fp8(x, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """x float32 [N] -> quantised in blocks, dequantised."""
    codes, scale = fp8_codes(tl.reshape(x, (x.shape[0] // BLOCK, BLOCK)), INTERPRET)
    return tl.reshape(codes.to(tl.float32) * scale[:, None], (x.shape[0],))


@triton.jit
def simulate_fp4(x):
    """x float32 [N] -> quantised in blocks of 32, dequantised."""
    codes, scale = fp4_codes(tl.reshape(x, (x.shape[0] // 32, 32)))
    return tl.reshape(fp4_values(codes) * scale[:, None], (x.shape[0],))


@triton.jit
def hadamard_row(x, BITS: tl.constexpr):
    """x float32 [2^BITS] times the orthonormal Sylvester matrix. A step butterflies the lowest bit of the channel and
    makes it the highest; after BITS steps every bit is back in its place."""
    width: tl.constexpr = 1 << BITS
    for _ in tl.static_range(BITS):
        a, b = tl.split(tl.reshape(x, (width // 2, 2)))
        x = tl.reshape(tl.trans(tl.join(a + b, a - b)), (width,))
    return x * (width**-0.5)


@triton.jit
def store_row(
    x, data, wide, scales, place, scale_place, scale_bytes,
    WIDTH: tl.constexpr, BITS: tl.constexpr, ROPE: tl.constexpr, FORMAT: tl.constexpr, SIMULATE: tl.constexpr,
    BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x float32 [WIDTH] to element offsets `place` of `data` and `scale_place` of `scales`; `wide` is the data seen as
    bf16 (kv_fp8), `scale_bytes` the size of its scale record. ROPE is 0 for index keys."""
    channel = tl.arange(0, WIDTH)
    if SIMULATE and ROPE == 0:
        x = as_activation(hadamard_row(x, BITS), BF16, INTERPRET)
    if FORMAT == 0:
        if SIMULATE:
            if ROPE == 0:
                x = simulate_fp4(x)
            else:
                x = tl.where(channel < WIDTH - ROPE, simulate_fp8(x, 64, INTERPRET), x)
        if data.dtype.element_ty == tl.bfloat16:
            tl.store(data + place + channel, to_bf16(x, INTERPRET))
        else:
            tl.store(data + place + channel, x)
    elif FORMAT == 1:
        plain: tl.constexpr = WIDTH - ROPE
        codes, scale = fp8_codes(tl.reshape(x, (WIDTH // 64, 64)), INTERPRET)
        bits = tl.reshape(codes.to(tl.uint8, bitcast=True), (WIDTH,))
        tl.store(data + place + channel, bits, mask=channel < plain)
        rotary = wide + place // 2 + plain // 2 + channel - plain
        tl.store(rotary, to_bf16(x, INTERPRET), mask=channel >= plain)
        block = tl.arange(0, WIDTH // 64)
        tl.store(scales + scale_place + block, exponent_byte(scale), mask=block < plain // 64)
        pad = tl.arange(0, WIDTH // 8)
        zero = tl.zeros((WIDTH // 8,), tl.uint8)
        tl.store(scales + scale_place + pad, zero, mask=(pad >= plain // 64) & (pad < scale_bytes))
    elif FORMAT == 2:
        codes, scale = fp4_codes(tl.reshape(x, (WIDTH // 32, 32)))
        low, high = tl.split(tl.reshape(codes, (WIDTH // 2, 2)))
        tl.store(data + place + tl.arange(0, WIDTH // 2), (low | (high << 4)).to(tl.uint8))
        tl.store(scales + scale_place + tl.arange(0, WIDTH // 32), exponent_byte(scale))
    else:
        codes, scale = fp8_codes(tl.reshape(x, (1, WIDTH)), INTERPRET)
        tl.store(data + place + channel, tl.reshape(codes.to(tl.uint8, bitcast=True), (WIDTH,)))
        tl.store(scales + scale_place + tl.arange(0, 1), scale)


@triton.jit
def _store_rows_kernel(
    values, pages, rows, data, wide, scales, stride_values, stride_page, stride_row, stride_page_scales,
    stride_row_scales, scale_bytes, WIDTH: tl.constexpr, BITS: tl.constexpr, ROPE: tl.constexpr, FORMAT: tl.constexpr,
    SIMULATE: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    page, row = tl.load(pages + number).to(tl.int64), tl.load(rows + number).to(tl.int64)
    x = tl.load(values + number * stride_values + tl.arange(0, WIDTH)).to(tl.float32)
    store_row(
        x, data, wide, scales, page * stride_page + row * stride_row,
        page * stride_page_scales + row * stride_row_scales, scale_bytes,
        WIDTH, BITS, ROPE, FORMAT, SIMULATE, BF16, INTERPRET,
    )  # fmt: skip


def views(pool: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
    """(data, data as bf16, scales) as the kernels take them; what a format does not have is the data again."""
    if pool.scales is None:
        return pool.data, pool.data, pool.data
    return pool.data, pool.data.view(torch.bfloat16) if pool.format == "kv_fp8" else pool.data, pool.scales


def strides(pool: PackedRows) -> tuple[int, int, int, int, int]:
    """(page, row, page of scales, row of scales) in elements, scales a row."""
    if pool.scales is None:
        return pool.data.stride(0), pool.data.stride(1), 0, 0, 0
    return pool.data.stride(0), pool.data.stride(1), pool.scales.stride(0), pool.scales.stride(1), pool.scales.shape[2]


def fits(pool: PackedRows) -> bool:
    """Whether the kernels know rows of this shape: a power of two of channels, whole quantisation blocks."""
    width, plain = pool.width, pool.width - pool.rope_dim
    shape = width >= 32 and width & (width - 1) == 0 and pool.rope_dim % 2 == 0
    return (
        shape and (pool.format != "kv_fp8" or (plain % 64 == 0 and width >= 64)) and not (pool.rope_dim and plain % 64)
    )


def store_rows_triton(pool: PackedRows, page: Tensor, row: Tensor, values_NC: Tensor, *, simulate: bool) -> None:
    """kernels.packed_rows.store_rows for values bf16 or float32, rows contiguous."""
    if not values_NC.shape[0]:
        return
    _store_rows_kernel[(values_NC.shape[0],)](
        values_NC, page, row, *views(pool), values_NC.stride(0), *strides(pool), WIDTH=pool.width,
        BITS=pool.width.bit_length() - 1, ROPE=pool.rope_dim, FORMAT=FORMATS[pool.format], SIMULATE=simulate,
        BF16=values_NC.dtype == torch.bfloat16, INTERPRET=INTERPRET, num_warps=4 if pool.width > 128 else 1,
    )  # fmt: skip


@triton.jit
def _insert_kernel(
    source, source_scales, target, target_scales, requests, positions, query_start, context_len, slot_ids,
    record, scale_record, stride_source, stride_source_scales, stride_slot, stride_row, stride_slot_scales,
    stride_row_scales, WINDOW: tl.constexpr, RECORD: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    request = tl.load(requests + token)
    end = tl.load(context_len + request) + tl.load(query_start + request + 1) - tl.load(query_start + request)
    position = tl.load(positions + token)
    if position >= end - WINDOW:
        slot, row = tl.load(slot_ids + request).to(tl.int64), position % WINDOW
        at = tl.arange(0, RECORD)
        data = tl.load(source + token * stride_source + at, mask=at < record)
        tl.store(target + slot * stride_slot + row * stride_row + at, data, mask=at < record)
        if SCALES:
            at = tl.arange(0, SCALES)
            data = tl.load(source_scales + token * stride_source_scales + at, mask=at < scale_record)
            place = target_scales + slot * stride_slot_scales + row * stride_row_scales + at
            tl.store(place, data, mask=at < scale_record)


def insert_window_triton(chunk: PackedRows, ring: PackedRows, index: BatchIndex) -> None:
    """kernels.window_ring.insert_window."""
    if not index.num_tokens:
        return
    data, _, scales = views(ring)
    source, _, source_scales = views(chunk)
    _, stride_source, _, stride_source_scales, _ = strides(chunk)
    *ring_strides, num_scales = strides(ring)
    record = ring.data.shape[2]
    _insert_kernel[(index.num_tokens,)](
        source, source_scales, data, scales, index.token_request_T, index.positions_T, index.query_start,
        index.context_len_B, index.slot_ids_B, record, num_scales, stride_source, stride_source_scales,
        ring_strides[0], ring_strides[1], ring_strides[2], ring_strides[3], WINDOW=ring.rows,
        RECORD=triton.next_power_of_2(record), SCALES=triton.next_power_of_2(num_scales) if num_scales else 0,
        num_warps=1,
    )  # fmt: skip
