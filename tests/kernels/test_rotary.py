"""The fused pass over heads against the twins it fuses."""

from __future__ import annotations

import pytest
import torch

from kernels.quantize import decode_e8m0, quantize_fp8
from kernels.rope import rope_angles, rope_ref
from kernels.triton_rotary import inverse_rope_quantize

SHAPES = [(0, 4, 128), (1, 1, 128), (3, 5, 256), (2, 64, 512), (9, 3, 512)]


def _case(generator, device, tokens, heads, width, dtype):
    x = (4 * torch.randn(tokens, heads + 1, width, generator=generator, device=device)).to(dtype)[:, :heads]
    frequencies = 10000.0 ** -(torch.arange(32, device=device) / 32)
    positions = torch.randint(0, 1 << 20, (tokens,), generator=generator, device=device)
    return x, *rope_angles(positions, frequencies)


@pytest.mark.parametrize(("tokens", "heads", "width"), SHAPES)
def test_inverse_rotation_and_quantisation_match_the_twins(generator, device, tokens, heads, width):
    x, cos, sin = _case(generator, device, tokens, heads, width, torch.bfloat16)
    x[..., :128] = 0.0
    got = inverse_rope_quantize(x, cos, sin)
    codes, scales = quantize_fp8(rope_ref(x, cos, sin, inverse=True).flatten(1), 128)
    same = got.codes_RD.view(torch.uint8) == codes
    plain = torch.ones(tokens, heads, width, dtype=torch.bool, device=device)
    plain[..., -128:] = False
    assert bool(same[plain.flatten(1)].all())  # nothing is computed there: bit for bit
    assert torch.equal(got.scales_GR[:, :tokens].T, decode_e8m0(scales))
    assert (
        not tokens or float(same.float().mean()) > 0.999
    )  # fused multiply-adds may round a rotated value the other way


def test_widths_without_whole_groups_are_refused(generator, device):
    x, cos, sin = _case(generator, device, 1, 1, 192, torch.bfloat16)
    with pytest.raises(ValueError, match="power of two"):
        inverse_rope_quantize(x, cos, sin)
