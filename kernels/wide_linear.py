"""x W^T whose result stays in float32: x [T, K] activation dtype, weight [N, K] -> float32 [T, N].

Router, compressors and vocabulary head need their products in full. Their weights are bfloat16 in the checkpoint, and
so are activations on a GPU: multiplying them as they are loses nothing, and float32 sums come out of the tensor cores.
A float32 weight multiplies in float32. On Hopper a row's sums do not depend on the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.row_linear import row_linear


def wide_linear_ref(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    return row_linear(x_TK.float(), weight_NK.float())


def wide_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """bfloat16 weights take bfloat16 rows."""
    if weight_NK.is_cuda and weight_NK.dtype == torch.bfloat16:
        if not x_TK.shape[0]:
            return torch.empty(0, weight_NK.shape[0], dtype=torch.float32, device=x_TK.device)
        from kernels.gpu_wide_linear import fits, wide_linear_gpu

        if fits(x_TK, weight_NK):
            return wide_linear_gpu(x_TK, weight_NK)
        return torch.mm(x_TK, weight_NK.t(), out_dtype=torch.float32)
    return wide_linear_ref(x_TK, weight_NK)
