"""Wide products: what their rows depend on."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu_wide_linear import Tile, fits, parts_of, tile_for, wide_linear_gpu
from kernels.wide_linear import wide_linear


def test_the_channels_are_cut_the_same_way_for_every_number_of_rows():
    assert [parts_of(outputs, channels) for _, outputs, channels in SMALL] == [8, 4, 2, 1]
    assert [parts_of(outputs, 4096) for outputs in (256, 1024, 2624, 129_280)] == [8, 4, 2, 1]
    assert [parts_of(256, channels) for channels in (64, 128, 192, 1024)] == [1, 2, 1, 8]
    for outputs in (1, 256, 129_280):
        assert [tile_for(rows, outputs).tokens for rows in (1, 16, 17, 64)] == [16, 16, 64, 64]


BIG = [(1024, 256, 4096), (2100, 1024, 4096), (1024, 2624, 4096), (1024, 200, 640), (1024, 1, 64)]
SMALL = [(40, 64, 512), (40, 576, 256), (40, 2112, 128), (40, 8320, 64)]
"""Of every way to cut the channels."""


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "outputs", "channels"), BIG + SMALL)
def test_a_row_is_the_same_alone_and_among_others(generator, device, rows, outputs, channels):
    x = torch.randn(rows, channels + 8, generator=generator, device=device).bfloat16()[:, 8:]
    weight = torch.randn(outputs, channels, generator=generator, device=device).bfloat16()
    everything = wide_linear_gpu(x, weight)
    expected = x.double() @ weight.double().T
    assert float((everything - expected).norm() / expected.norm()) < 5e-6
    beside = (Tile(16, 1), Tile(64, 1), Tile(128, 1), Tile(256, 1), Tile(128, 2), Tile(256, 2))
    for tile in (*beside, Tile(128, 2, in_turn=True)):
        assert torch.equal(wide_linear_gpu(x, weight, tile=tile), everything)
    for count in (1, 7, 16, 17, 65, 257):
        for part in (slice(0, count), slice(-count, None)):
            assert torch.equal(wide_linear(x[part], weight), everything[part])


@pytest.mark.gpu
def test_what_the_kernel_does_not_know_goes_elsewhere(generator, device):
    def operands(rows, outputs, channels):
        shapes = (rows, channels), (outputs, channels)
        return (torch.randn(*shape, generator=generator, device=device).bfloat16() for shape in shapes)

    for rows, outputs, channels in ((0, 4, 64), (3, 4, 96), (2, 4, 63)):
        x, weight = operands(rows, outputs, channels)
        assert not fits(x, weight)
        torch.testing.assert_close(wide_linear(x, weight), x.float() @ weight.float().T, rtol=1e-5, atol=1e-3)
