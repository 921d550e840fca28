"""The packed order of expert weights loses nothing."""

from __future__ import annotations

import pytest
import torch

from kernels.packed_experts import MAX_SHIFT, gate_up_order, pack_experts, unpack_values
from kernels.quantize import dequantize_fp4


def _experts(seed: int, spread: int, rows: int = 512, channels: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (2, rows, channels // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 100 + spread + 1, (2, rows, channels // 32), dtype=torch.uint8, generator=generator)
    return codes, scales


@pytest.mark.parametrize("spread", [0, 3, MAX_SHIFT])
def test_unpacking_returns_the_checkpoint_values_bit_for_bit(spread):
    codes, scales = _experts(spread, spread)
    order = gate_up_order(256)
    values = unpack_values(pack_experts(codes, scales, order))
    expected = dequantize_fp4(codes, scales, 32)[:, order]
    assert torch.equal(values, expected)


def test_gate_and_up_rows_of_one_column_meet_in_one_thread():
    order = gate_up_order(256).view(-1, 2, 8)
    assert torch.equal(order[:, 1], order[:, 0] + 256)
    assert torch.equal(order[:, 0].flatten(), torch.arange(256))


def test_a_row_with_too_wide_scales_is_refused():
    codes, scales = _experts(1, 0)
    codes[1, 7] = 0x11
    scales[1, 7, 3] = 100 + MAX_SHIFT + 1
    with pytest.raises(ValueError, match=f"2\\^{MAX_SHIFT + 1}"):
        pack_experts(codes, scales)


def test_scales_of_groups_without_a_value_do_not_matter():
    codes, scales = _experts(2, 0)
    codes[0, 3, :16] = 0x80  # zero and minus zero
    scales[0, 3, 0] = 254
    values = unpack_values(pack_experts(codes, scales))
    assert torch.equal(values[0, 3, :32], torch.zeros(32))
    assert torch.equal(values[0, 3, 32:], dequantize_fp4(codes, scales, 32)[0, 3, 32:])


@pytest.mark.parametrize("shape", [(255, 256), (256, 64)])
def test_shapes_that_fill_no_tile_are_refused(shape):
    codes, scales = _experts(3, 0, *shape)
    with pytest.raises(ValueError, match="packed experts need"):
        pack_experts(codes, scales)
