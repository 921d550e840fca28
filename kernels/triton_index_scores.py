"""The indexer's scores in Triton (specification: kernels.indexer.index_scores_ref).

T tokens, H heads, D channels, m ratio. A program takes TOKENS neighbouring tokens with all their heads and every
SPLITS-th block of KEYS index keys, straight from the pages, and writes score[t, j] = sum_h w[t, h] relu(q[t, h] . k_j).
Tokens that see at most TOPK entries need no scores and get none; nothing is written beyond what a token sees.

MXFP4 and bf16 keys multiply in bf16, where they are exact. FP8 keys multiply as e4m3 with the queries packed the same
way: the query's scale goes into the head's weight, the key's to the sum, both being positive powers of two. Bound by
the reads of keys at decode, by the tensor cores at prefill, where keys come from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_index import BatchIndex
from kernels.packed_rows import PackedRows
from kernels.triton_common import INTERPRET, dot_operand, from_exponent_byte
from kernels.triton_fp8_gemm import num_multiprocessors
from kernels.triton_rows import FORMATS, fp4_values, fp8_codes, strides

ROWS = 256
"""Query rows (tokens times heads) of a program where tokens abound, at most: they share the unpacking of keys."""
KEYS = 64
MOST_TOKENS = 4
"""Of a program: with 8 warps a thread stores one score. Where it stores two, Triton 3.6 passes the scores, each held by
several threads, through shared memory with `stmatrix`, and several threads write one value to one word."""
PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _fp4_half(codes, scale, KEYS: tl.constexpr, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Nibbles int32 [KEYS, WIDTH / 32, 16] and scales [KEYS, WIDTH / 32] -> [KEYS, WIDTH / 2] for tl.dot."""
    return dot_operand(tl.reshape(fp4_values(codes) * scale[:, :, None], (KEYS, WIDTH // 2)), INTERPRET)


@triton.jit
def _scores_kernel(
    query, weights, data, key_scales, requests, positions, page_table, scores,
    first_token, num_tokens, num_heads, ratio, rows_per_page, stride_query, stride_weights, stride_pages, stride_page,
    stride_entry, stride_page_scales, stride_entry_scales, stride_scores,
    TOPK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    FORMAT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    leader = tl.program_id(0) * TOKENS
    split, splits = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, TOKENS * HEADS)
    head = row % HEADS
    row_token = leader + row // HEADS
    live = (row_token < num_tokens) & (head < num_heads)
    source = query + (first_token + row_token).to(tl.int64)[:, None] * stride_query + head[:, None] * WIDTH
    weight = tl.load(weights + (first_token + row_token).to(tl.int64) * stride_weights + head, mask=live, other=0.0)
    weight = weight.to(tl.float32)
    channel = tl.arange(0, WIDTH)
    half = tl.arange(0, WIDTH // 2)
    if FORMAT == 2:
        # A byte holds an even and an odd channel: sums do not mind the order, so neither do the products.
        even = dot_operand(tl.load(source + 2 * half[None, :], mask=live[:, None], other=0.0), INTERPRET)
        odd = dot_operand(tl.load(source + 2 * half[None, :] + 1, mask=live[:, None], other=0.0), INTERPRET)
    else:
        rows = tl.load(source + channel[None, :], mask=live[:, None], other=0.0)
        if FORMAT == 3:
            codes, scale = fp8_codes(rows.to(tl.float32), INTERPRET)
            weight = weight * scale
        else:
            rows = dot_operand(rows, INTERPRET)

    member = leader + tl.arange(0, TOKENS)
    inside = member < num_tokens
    owner = tl.load(requests + first_token + member, mask=inside, other=-1)
    seen = (tl.load(positions + first_token + member, mask=inside, other=0).to(tl.int32) + 1) // ratio
    seen = tl.where(inside & (seen > TOPK), seen, 0)
    target = scores + member.to(tl.int64)[:, None] * stride_scores
    for turn in range(TOKENS):
        # A request's first token here stands for all of them.
        request = tl.max(tl.where(tl.arange(0, TOKENS) == turn, owner, -1), axis=0)
        first = tl.min(tl.where(owner == request, tl.arange(0, TOKENS), TOKENS), axis=0)
        visible = tl.where(owner == request, seen, 0)
        count = tl.where((request >= 0) & (first == turn), tl.max(visible, axis=0), 0)
        pages = page_table + request.to(tl.int64) * stride_pages
        for block in range(split * KEYS, count, splits * KEYS):
            entry = block + tl.arange(0, KEYS)
            known = entry < count
            page = tl.load(pages + entry // rows_per_page, mask=known, other=0).to(tl.int64)
            place = page * stride_page + entry % rows_per_page * stride_entry
            scale_place = page * stride_page_scales + entry % rows_per_page * stride_entry_scales
            if FORMAT == 2:
                group, byte = tl.arange(0, WIDTH // 32), tl.arange(0, 16)
                at = data + place[:, None, None] + (group[None, :, None] * 16 + byte[None, None, :])
                packed = tl.load(at, mask=known[:, None, None], other=0).to(tl.int32)
                exponent = tl.load(key_scales + scale_place[:, None] + group[None, :], mask=known[:, None], other=127)
                factor = from_exponent_byte(exponent)
                logits = tl.dot(even, tl.trans(_fp4_half(packed & 15, factor, KEYS, WIDTH, INTERPRET)))
                logits = tl.dot(odd, tl.trans(_fp4_half(packed >> 4, factor, KEYS, WIDTH, INTERPRET)), logits)
            else:
                keys = tl.load(data + place[:, None] + channel[None, :], mask=known[:, None], other=0.0)
                if FORMAT == 3:
                    logits = tl.dot(codes, tl.trans(keys))
                else:
                    logits = tl.dot(rows, tl.trans(dot_operand(keys, INTERPRET)))
            weighted = tl.maximum(logits, 0.0) * weight[:, None]
            score = tl.sum(tl.reshape(weighted, (TOKENS, HEADS, KEYS)), axis=1)
            if FORMAT == 3:
                score = score * tl.load(key_scales + scale_place, mask=known, other=0.0)[None, :]
            tl.store(target + entry[None, :], score, mask=entry[None, :] < visible[:, None])


def fits(query_THD: Tensor, keys: PackedRows) -> bool:
    """Whether the kernel knows these queries and keys."""
    width = query_THD.shape[2]
    return query_THD.dtype == torch.bfloat16 and width >= 32 and width & (width - 1) == 0 and keys.format != "f32"


def index_scores(
    query_THD: Tensor,
    weights_TH: Tensor,
    keys: PackedRows,
    index: BatchIndex,
    ratio: int,
    topk: int,
    scores_NL: Tensor,
    first_token: int,
) -> None:
    """Scores of tokens first_token .. first_token + N - 1 into scores float32 [N, L], L the most entries a page table
    row can name. Written are entries j < (p + 1) // ratio of tokens that see more than `topk`."""
    num_tokens, most = scores_NL.shape
    num_heads, width = query_THD.shape[1:]
    heads = max(16, triton.next_power_of_2(num_heads))  # tensor cores multiply no fewer rows
    multiprocessors = num_multiprocessors(query_THD.device)
    rows = ROWS // 2 if keys.format == "key_fp8" else ROWS  # FP8 keys need no unpacking
    many = num_tokens * heads >= ROWS * multiprocessors
    tokens = max(1, min(rows // heads, MOST_TOKENS)) if many else 1
    groups = triton.cdiv(num_tokens, tokens)
    splits = max(1, min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // groups, triton.cdiv(most, KEYS)))
    data = keys.data.view(torch.float8_e4m3fn) if keys.format == "key_fp8" else keys.data
    stride_page, stride_entry, stride_page_scales, stride_entry_scales, _ = strides(keys)
    _scores_kernel[(groups, splits)](
        query_THD, weights_TH, data, data if keys.scales is None else keys.scales, index.token_request_T,
        index.positions_T, index.page_table, scores_NL, first_token, num_tokens, num_heads, ratio,
        index.page_tokens // ratio, query_THD.stride(0), weights_TH.stride(0), index.page_table.stride(0), stride_page,
        stride_entry, stride_page_scales, stride_entry_scales, scores_NL.stride(0), TOPK=topk, TOKENS=tokens,
        HEADS=heads, WIDTH=width, KEYS=KEYS, FORMAT=FORMATS[keys.format], INTERPRET=INTERPRET,
        num_warps=8 if tokens > 1 or heads > 64 else 4, num_stages=2, maxnreg=128,
    )  # fmt: skip
