"""Activations on their way from one op to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels.quantize import QuantizedRows


class Activations(NamedTuple):
    """Rows [T, D], and their e4m3 form where whoever made them has made it on the way."""

    plain: Tensor
    quantized: QuantizedRows | None = None

    @property
    def for_fp8(self) -> Tensor | QuantizedRows:
        """What a product of quantised rows takes: it quantises what is not."""
        return self.plain if self.quantized is None else self.quantized
