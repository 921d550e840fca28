"""x W^T with rows that do not depend on how many rows there are: x [..., K], weight [N, K], same dtype; -> [..., N].

CPU BLAS libraries take another summation order for fewer than four rows (matrix-vector code). A request would then
decode to other last bits alone than beside others, and bits decide expert choices and quantisation steps. Repeating
rows up to four keeps one order, as long as torch runs on one thread (more of them split long sums). On CUDA this is
torch's linear.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MIN_ROWS = 4


def row_linear(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.shape[:-1].numel()
    if x.is_cuda or rows >= MIN_ROWS or rows == 0:
        return functional.linear(x, weight)
    flat = x if x.dim() == 2 else x.reshape(rows, -1)
    product = functional.linear(torch.cat((flat,) * -(-MIN_ROWS // rows)), weight)[:rows]
    return product if x.dim() == 2 else product.view(*x.shape[:-1], -1)
