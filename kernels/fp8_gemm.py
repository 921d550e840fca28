"""W8A8 linear with block scales: x [T, K], weight e4m3 [N, K] with an E8M0 scale per 128 x 128 tile -> [T, N] like x.

The input is quantised per token and 128 channels (power-of-two scales); products accumulate in float32 and both scales
apply per 128-channel slab. Since scales are powers of two and values fit in bfloat16, multiplying dequantised operands
is the same arithmetic up to the order of the float32 sum, which is what the twin does. Bound by the read of the weight
at decode, by the FP8 tensor cores at prefill.
"""

from __future__ import annotations

from torch import Tensor

from kernels.dispatch import use_triton
from kernels.quantize import QuantizedRows, dequantize_fp8_tiles, simulate_fp8
from kernels.row_linear import row_linear

BLOCK = 128


def fp8_gemm_ref(x_TK: Tensor, codes_NK: Tensor, scales_nk: Tensor) -> Tensor:
    weight = dequantize_fp8_tiles(codes_NK, scales_nk, BLOCK).to(x_TK.dtype)
    return row_linear(simulate_fp8(x_TK, BLOCK), weight)


def fp8_gemm(x_TK: Tensor | QuantizedRows, codes_NK: Tensor, scales_nk: Tensor) -> Tensor:
    """codes uint8 [N, K]; scales uint8 [ceil(N / 128), ceil(K / 128)]. Rows quantised by a GPU kernel give bf16."""
    if isinstance(x_TK, QuantizedRows) or use_triton(x_TK):
        from kernels.gpu_fp8_gemm import fp8_gemm_gpu

        return fp8_gemm_gpu(x_TK, codes_NK, scales_nk)
    return fp8_gemm_ref(x_TK, codes_NK, scales_nk)
