"""First half of the output projection, one low-rank block per group of heads.

x [T, G, C], weight [G, R, C] -> [T, G R]. Bound by the read of the weight at decode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.row_linear import row_linear


def grouped_output_ref(x_TGC: Tensor, weight_GRC: Tensor) -> Tensor:
    return torch.cat([row_linear(x_TGC[:, group], weight) for group, weight in enumerate(weight_GRC)], -1)


def grouped_output(x_TGC: Tensor, weight_GRC: Tensor) -> Tensor:
    if x_TGC.is_cuda:
        groups, rank, _ = weight_GRC.shape
        output = torch.empty(x_TGC.shape[0], groups, rank, dtype=x_TGC.dtype, device=x_TGC.device)
        torch.bmm(x_TGC.transpose(0, 1), weight_GRC.mT, out=output.transpose(0, 1))
        return output.flatten(1)
    return grouped_output_ref(x_TGC, weight_GRC)
