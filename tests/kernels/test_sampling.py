"""Draws and truncations without a sort against the twin."""

from __future__ import annotations

import pytest
import torch

from kernels.sampling import Truncation, draw_ref
from kernels.triton_sampling import draw_triton

VOCAB = 1500


def _draw_both(device, logits, *, temperature, uniform, min_p=None, top_k=None, top_p=None, rows=None):
    """Tokens of every row by kernel and twin; top_k 0 and top_p 1 are off."""
    count, vocabulary = logits.shape
    rows = torch.arange(count) if rows is None else rows
    truncation = None
    if top_k is not None:
        cut = ((top_k > 0) | (top_p < 1)).nonzero()[:, 0]
        ks = torch.where(top_k > 0, top_k, vocabulary)[cut]
        truncation = Truncation(cut, ks, top_p[cut].double(), int(ks.max()))
    inputs = (logits, logits.amax(-1), rows, temperature, uniform.double(), min_p)
    on_device = [None if tensor is None else tensor.to(device) for tensor in inputs]
    moved = None if truncation is None else Truncation(*(t.to(device) for t in truncation[:3]), truncation.max_top_k)
    return draw_triton(*on_device, moved).cpu(), draw_ref(*inputs, truncation)


def _rows(count, vocabulary=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, vocabulary, generator=generator)
    return logits, torch.rand(count, generator=generator) + 0.3, torch.rand(count, generator=generator)


@pytest.mark.parametrize("vocabulary", [1, 7, 1024, VOCAB])
def test_draws_invert_the_distribution(device, vocabulary):
    logits, temperature, uniform = _rows(4, vocabulary, seed=vocabulary)
    got, expected = _draw_both(device, logits, temperature=temperature, uniform=uniform)
    assert got.tolist() == expected.tolist()


def test_every_truncation_keeps_what_the_twin_keeps(device):
    logits, temperature, uniform = _rows(12, 1000)
    top_k = torch.tensor([1, 2, 40, 0, 0, 0, 50, 1000, 3, 0, 700, 1])
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.01, 0.5, 0.95, 0.8, 0.999, 0.0001, 1.0, 0.3, 0.5])
    min_p = torch.tensor([0.0, 0.0, 0.01, 0.0, 0.2, 0.0, 0.05, 1.0, 0.0, 0.1, 0.0, 0.0])
    for place, floor in ((0.37, None), (0.999999, min_p)):
        options = {"temperature": temperature, "uniform": uniform * 0 + place, "min_p": floor}
        got, expected = _draw_both(device, logits, **options, top_k=top_k, top_p=top_p)
        assert got.tolist() == expected.tolist()


def test_truncation_walks_the_whole_vocabulary(device):
    logits, temperature, uniform = _rows(2, 1100, seed=4)
    got, expected = _draw_both(
        device, logits, temperature=temperature + 2, uniform=uniform, top_k=torch.tensor([900, 0]),
        top_p=torch.tensor([0.99, 0.97]),
    )  # fmt: skip
    assert got.tolist() == expected.tolist()


def test_equal_logits_stand_or_fall_together(device):
    logits = torch.zeros(1, 64)
    logits[0, [4, 8, 15]] = 6.0
    drawn = set()
    for place in (0.1, 0.5, 0.9):
        got, expected = _draw_both(
            device, logits, temperature=torch.ones(1), uniform=torch.tensor([place]), top_k=torch.tensor([2]),
            top_p=torch.tensor([0.6]),
        )  # fmt: skip
        assert got.tolist() == expected.tolist()
        drawn.add(int(got))
    assert drawn == {4, 8, 15}


def test_banned_logits_are_never_drawn_and_the_last_allowed_one_can_be(device):
    logits = torch.full((2, 700), float("-inf"))
    logits[0, 3], logits[1, 5], logits[1, 699] = 1.0, 0.0, 0.0
    nearly_one = torch.full((2,), 1.0 - 2.0**-53, dtype=torch.float64)
    got, _ = _draw_both(device, logits, temperature=torch.ones(2), uniform=nearly_one)
    assert got.tolist() == [3, 699]
    got, _ = _draw_both(device, logits, temperature=torch.ones(2), uniform=torch.zeros(2))
    assert got.tolist() == [3, 5]


def test_only_the_given_rows_are_drawn(device):
    logits, temperature, uniform = _rows(5, 100)
    rows = torch.tensor([4, 1])
    got, expected = _draw_both(device, logits, temperature=temperature[:2], uniform=uniform[:2], rows=rows)
    assert got.tolist() == expected.tolist()
    none = torch.zeros(0, dtype=torch.int64)
    got, _ = _draw_both(device, logits, temperature=temperature[:0], uniform=uniform[:0], rows=none)
    assert got.shape == (0,)


def test_rows_without_a_maximum_stay_inside_the_vocabulary(device):
    logits = torch.full((1, 30), torch.nan)
    got, _ = _draw_both(device, logits, temperature=torch.ones(1), uniform=torch.zeros(1))
    assert 0 <= int(got) < 30


@pytest.mark.gpu
def test_truncations_at_the_released_vocabulary(device):
    logits, temperature, uniform = _rows(64, 129_280)
    top_k = torch.tensor([0, 50, 0, 20]).repeat(16)
    top_p = torch.tensor([0.95, 0.9, 0.5, 1.0]).repeat(16)
    got, expected = _draw_both(device, logits, temperature=temperature, uniform=uniform, top_k=top_k, top_p=top_p)
    # A sum that ends within float32's rounding of a bound moves the bound by one id.
    assert float((got == expected).float().mean()) > 0.95
