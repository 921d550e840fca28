"""Hyper-connection kernels against their twins."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu_hyper_connection import Division, hyper_post_pre_gpu, hyper_pre_gpu, pack_rows
from kernels.hyper_connection import (
    HyperSettings,
    HyperWeights,
    Mix,
    hyper_head_ref,
    hyper_post_ref,
    hyper_pre_ref,
)
from kernels.triton_hyper_connection import (
    hyper_head_triton,
    hyper_post_pre_triton,
    hyper_post_triton,
    hyper_pre_triton,
)
from kernels.triton_quantize import quantize_activations

SETTINGS = HyperSettings(iterations=20, hc_eps=1e-6, norm_eps=1e-6)


def _relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def _case(generator, device, tokens, hidden, num=24):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    streams = (3 * normal(tokens, 4, hidden)).bfloat16()
    scale = normal(1) if num == 4 else normal(24).abs() + 0.2
    weights = HyperWeights(normal(num, 4 * hidden) / 8, normal(num), scale)
    mix = Mix(normal(tokens, 4).sigmoid() * 2, normal(tokens, 4, 4).softmax(-1))
    return streams, weights, normal(hidden).abs() + 0.5, normal(tokens, hidden).bfloat16(), mix


SHAPES = [(0, 128), (1, 256), (7, 128), (33, 384)]
"""33 tokens are one more than a Sinkhorn program takes, and two blocks of the projection."""


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def test_the_seam_between_sublayers_matches_post_then_pre(generator, device, tokens, hidden):
    streams, weights, norm, output, mix = _case(generator, device, tokens, hidden)
    new, inputs, following = hyper_post_pre_triton(output, streams, mix, weights, norm, SETTINGS)
    expected = hyper_post_ref(output, streams, mix)
    expected_inputs, expected_mix = hyper_pre_ref(expected, weights, norm, SETTINGS)
    assert _relative(new, expected) < 1e-3  # a sum that lands on a rounding boundary may fall to either side
    assert _relative(inputs, expected_inputs) < 3e-3
    assert _relative(following.post_TS, expected_mix.post_TS) < 1e-3
    assert _relative(following.comb_TSS, expected_mix.comb_TSS) < 1e-3


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def test_reading_the_streams_matches_pre(generator, device, tokens, hidden):
    streams, weights, norm, _, _ = _case(generator, device, tokens, hidden)
    inputs, mix = hyper_pre_triton(streams, weights, norm, SETTINGS)
    expected, expected_mix = hyper_pre_ref(streams, weights, norm, SETTINGS)
    assert _relative(inputs, expected) < 2e-3
    assert _relative(mix.post_TS, expected_mix.post_TS) < 2e-5
    assert _relative(mix.comb_TSS, expected_mix.comb_TSS) < 2e-4


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def test_writing_the_streams_matches_post(generator, device, tokens, hidden):
    streams, _, _, output, mix = _case(generator, device, tokens, hidden)
    got = hyper_post_triton(output, streams, mix)
    assert _relative(got, hyper_post_ref(output, streams, mix)) < 1e-3


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def test_the_head_collapses_the_streams_like_its_twin(generator, device, tokens, hidden):
    streams, weights, _, _, _ = _case(generator, device, tokens, hidden, num=4)
    got = hyper_head_triton(streams, weights, SETTINGS)
    assert _relative(got, hyper_head_ref(streams, weights, SETTINGS)) < 2e-3


@pytest.mark.gpu
def test_a_token_of_the_triton_kernels_is_the_same_alone_and_among_others(generator, device):
    streams, weights, norm, output, mix = _case(generator, device, 67, 1024)
    head = HyperWeights(weights.fn[:4].contiguous(), weights.base[:4].contiguous(), weights.scale[:1])

    def run(rows):
        part = Mix(mix.post_TS[rows], mix.comb_TSS[rows])
        new, inputs, following = hyper_post_pre_triton(output[rows], streams[rows], part, weights, norm, SETTINGS)
        return new, inputs, following.post_TS, following.comb_TSS, hyper_head_triton(streams[rows], head, SETTINGS)

    everything = run(slice(None))
    for rows in (slice(0, 1), slice(3, 20), slice(66, 67), *[slice(None)] * 20):
        for got, expected in zip(run(rows), everything, strict=True):
            assert torch.equal(got, expected[rows])


def test_combinations_are_nearly_doubly_stochastic_even_for_extreme_logits(generator, device):
    streams, weights, norm, _, _ = _case(generator, device, 5, 128)
    weights = HyperWeights(weights.fn * 40, weights.base, weights.scale)
    _, mix = hyper_pre_triton(streams, weights, norm, SETTINGS)
    assert bool(mix.comb_TSS.isfinite().all())
    assert float((mix.comb_TSS.sum(1) - 1).abs().max()) < 1e-3


def test_shapes_the_kernel_was_not_made_for_are_refused(generator, device):
    streams, weights, norm, _, _ = _case(generator, device, 2, 128)
    for bad in (streams[:, :3], streams[..., :100], streams.float()):
        with pytest.raises(ValueError, match="the kernel needs"):
            hyper_pre_triton(bad, weights, norm, SETTINGS)


def test_the_packed_rows_are_the_left_operands_of_the_tensor_cores(generator, device):
    """Multiplies lane by lane as m16n8k16 does, with the channels where a thread of the kernel has them."""
    tokens, hidden = 8, 64
    fn = torch.randn(24, 4 * hidden, generator=generator, device=device)
    streams = torch.randn(tokens, 4, hidden, generator=generator, device=device).bfloat16().double()
    packed = pack_rows(fn).double().view(hidden // 32, 4, 3, 2, 8, 4, 2, 2, 2)  # .. row, quad, pair, half, channel
    owned = streams.view(tokens, 4, hidden // 32, 4, 2, 2, 2)  # token, stream, block, quad, step, pair, channel
    product = torch.einsum("bsthrqpxe,nsbqhpe->trn", packed, owned)
    assert _relative(product.reshape(24, tokens), fn.double() @ streams.flatten(1).T) < 2**-16


TOKENS = [0, 1, 7, 64, 65, 257, 1000]
"""None, fewer than a tile, one more than whole tiles, and every division of the work."""


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [1024, 4096, 7168, 8192])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_seam_on_hopper_matches_post_then_pre(generator, device, tokens, hidden):
    streams, weights, norm, output, mix = _case(generator, device, tokens, hidden)
    new, inputs, following = hyper_post_pre_gpu(output, streams, mix, weights, norm, SETTINGS, quantize=True)
    expected = hyper_post_ref(output, streams, mix)
    expected_inputs, expected_mix = hyper_pre_ref(expected, weights, norm, SETTINGS)
    assert _relative(new, expected) < 1e-3
    assert _relative(inputs.plain, expected_inputs) < 3e-3
    assert _relative(following.post_TS, expected_mix.post_TS) < 1e-3
    assert _relative(following.comb_TSS, expected_mix.comb_TSS) < 1e-3
    codes, scales = quantize_activations(inputs.plain)
    assert inputs.quantized is not None
    assert torch.equal(inputs.quantized.codes_RD.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(inputs.quantized.scales_GR[:, :tokens], scales[:, :tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_reading_the_streams_on_hopper_matches_pre(generator, device, tokens):
    streams, weights, norm, _, _ = _case(generator, device, tokens, 4096)
    before = streams.clone()
    inputs, mix = hyper_pre_gpu(streams, weights, norm, SETTINGS)
    expected, expected_mix = hyper_pre_ref(streams, weights, norm, SETTINGS)
    assert torch.equal(streams, before)
    assert inputs.quantized is None
    assert _relative(inputs.plain, expected) < 2e-3
    assert _relative(mix.post_TS, expected_mix.post_TS) < 2e-5
    assert _relative(mix.comb_TSS, expected_mix.comb_TSS) < 2e-4


@pytest.mark.gpu
def test_combinations_of_the_hopper_kernel_are_nearly_doubly_stochastic_even_for_extreme_logits(generator, device):
    streams, weights, norm, _, _ = _case(generator, device, 5, 1024)
    _, mix = hyper_pre_gpu(streams, weights._replace(fn=weights.fn * 40), norm, SETTINGS)
    assert bool(mix.comb_TSS.isfinite().all())
    assert float((mix.comb_TSS.sum(1) - 1).abs().max()) < 1e-3


@pytest.mark.gpu
def test_a_token_comes_out_of_the_seam_the_same_alone_and_among_any_others(generator, device):
    tokens = 300
    streams, weights, norm, output, mix = _case(generator, device, tokens, 4096)

    def run(rows, division):
        args = output[rows], streams[rows], Mix(mix.post_TS[rows], mix.comb_TSS[rows]), weights, norm, SETTINGS
        new, inputs, following = hyper_post_pre_gpu(*args, division=division)
        return new, inputs.plain, *following

    everything = run(slice(None), None)
    for division in (Division(2, 1), Division(2, 2), Division(4, 1), Division(4, 2)):
        for rows in (slice(None), slice(77, 78), slice(13, 200)):
            for got, expected in zip(run(rows, division), everything, strict=True):
                assert torch.equal(got, expected[rows])
