"""The indexer's queries in Triton: rotation, Hadamard transform and the keys' quantisation in one pass
(specification: kernels.indexer.index_query_ref).

T tokens, H heads, D channels (a power of two). The transform is a product with the matrix of signs on the tensor cores:
bf16 operands are exact and sums are float32. Bound by memory: one read and one write of the queries.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hadamard import hadamard_matrix
from kernels.packed_rows import PackedRows
from kernels.triton_common import INTERPRET, dot_operand, to_bf16
from kernels.triton_rows import as_activation, fp4_codes, fp4_values, fp8_codes, rotate

ROWS = 64
"""Heads a program holds at most."""


@triton.jit
def _query_kernel(
    query, cos, sin, signs, num_heads, stride_query,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, SIMULATE: tl.constexpr, FP8: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, channel = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    inside = (head < num_heads)[:, None]
    place = query + token * stride_query + head[:, None] * WIDTH + channel[None, :]
    x = tl.load(place, mask=inside, other=0.0)
    x = as_activation(rotate(x.to(tl.float32), cos, sin, token, ROPE, False), True, INTERPRET)
    if SIMULATE:
        matrix = tl.load(signs + channel[:, None] * WIDTH + channel[None, :])
        x = tl.dot(dot_operand(x, INTERPRET), dot_operand(matrix, INTERPRET)) * (WIDTH**-0.5)
        x = as_activation(x, True, INTERPRET)
        if FP8:
            codes, scale = fp8_codes(x, INTERPRET)
            x = codes.to(tl.float32) * scale[:, None]
        else:
            codes, scale = fp4_codes(tl.reshape(x, (HEADS * WIDTH // 32, 32)))
            x = tl.reshape(fp4_values(codes) * scale[:, None], (HEADS, WIDTH))
    tl.store(place, to_bf16(x, INTERPRET), mask=inside)


@lru_cache(maxsize=4)
def _signs(dim: int, device: torch.device) -> Tensor:
    return hadamard_matrix(dim, device).sign().bfloat16()


def fits(query_THD: Tensor, keys: PackedRows) -> bool:
    """Whether the kernel knows these queries."""
    width = query_THD.shape[2]
    return query_THD.dtype == torch.bfloat16 and width >= 32 and width & (width - 1) == 0 and keys.format != "f32"


def index_query_triton(query_THD: Tensor, angles: tuple[Tensor, Tensor], keys: PackedRows, *, simulate: bool) -> Tensor:
    """kernels.indexer.index_query for bf16 queries with contiguous heads, which are overwritten."""
    num_tokens, num_heads, width = query_THD.shape
    if num_tokens:
        heads = max(16, min(ROWS, triton.next_power_of_2(num_heads)))
        _query_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
            query_THD, *angles, _signs(width, query_THD.device), num_heads, query_THD.stride(0),
            HEADS=heads, WIDTH=width, ROPE=2 * angles[0].shape[1], SIMULATE=simulate, FP8=keys.format == "key_fp8",
            INTERPRET=INTERPRET, num_warps=4,
        )  # fmt: skip
    return query_THD
