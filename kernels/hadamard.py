"""Orthonormal Walsh-Hadamard transform of the last dimension (Sylvester order): x [..., D], D = 2^n; -> like x.

y = x H / sqrt(D) with H[i, j] = (-1)^popcount(i & j), in float32, rounded once to x's dtype. Spreads outliers over all
channels before the indexer's 4-bit quantisation; being orthogonal, it leaves dot products alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kernels.row_linear import row_linear


@lru_cache(maxsize=8)
def hadamard_matrix(dim: int, device: torch.device) -> Tensor:
    """float32 [dim, dim], symmetric, orthonormal."""
    if dim & (dim - 1):
        raise ValueError(f"dim={dim}: not a power of two")
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix * dim**-0.5


def hadamard_ref(x: Tensor) -> Tensor:
    return row_linear(x.float(), hadamard_matrix(x.shape[-1], x.device)).to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    return hadamard_ref(x)
