"""Hyper-connection kernels against their twins."""

from __future__ import annotations

import pytest
import torch

from kernels.hyper_connection import HyperSettings, HyperWeights, Mix, hyper_head_ref, hyper_post_ref, hyper_pre_ref
from kernels.triton_hyper_connection import (
    hyper_head_triton,
    hyper_post_pre_triton,
    hyper_post_triton,
    hyper_pre_triton,
)

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
