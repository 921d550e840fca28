"""Expert choice against its twin."""

from __future__ import annotations

import pytest
import torch

from kernels.moe import route_by_score_ref, route_by_token_ref
from kernels.triton_gate import pick_experts


def _identity_case(generator, device, tokens, experts):
    """Inputs whose product with an identity router is any logits one likes."""
    logits = 6 * torch.randn(tokens, experts, generator=generator, device=device)
    return logits, torch.eye(experts, device=device)


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(0, 8, 2), (1, 8, 2), (5, 256, 6), (3, 300, 8)])
def test_the_best_scores_are_taken_in_order(generator, device, tokens, experts, topk):
    logits, router = _identity_case(generator, device, tokens, experts)
    bias = torch.randn(experts, generator=generator, device=device)
    got, weights = pick_experts(logits, topk, 1.5, bias_E=bias)
    expected, expected_weights = route_by_score_ref(logits, router, bias, topk, 1.5)
    assert torch.equal(got, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-9)


def test_ties_go_to_the_lower_expert(device):
    got, _ = pick_experts(torch.zeros(2, 16, device=device), 4, 1.0, bias_E=torch.zeros(16, device=device))
    assert got.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("level", [-60.0, -17.0, -1e-3, 0.0, 19.9, 20.1, 90.0])
def test_scores_keep_their_digits_at_every_size(device, level):
    logits = torch.linspace(level - 1, level, 8, device=device)[None]
    got, weights = pick_experts(logits, 3, 1.0, bias_E=torch.zeros(8, device=device))
    exact = torch.nn.functional.softplus(logits.double(), threshold=1e9).sqrt()[0, got[0]]
    torch.testing.assert_close(weights[0].double(), exact / (exact.sum() + 1e-20), rtol=3e-6, atol=0.0)


def test_given_experts_get_their_own_scores(generator, device):
    logits, router = _identity_case(generator, device, 7, 16)
    table = torch.randint(0, 16, (50, 3), generator=generator, device=device).int()
    ids = torch.randint(0, 50, (7,), generator=generator, device=device)
    got, weights = pick_experts(logits, 3, 2.5, given_VK=table, token_ids_T=ids)
    expected, expected_weights = route_by_token_ref(logits, router, table, ids, 2.5)
    assert torch.equal(got, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("given", [False, True])
def test_padding_goes_nowhere(generator, device, given):
    logits, _ = _identity_case(generator, device, 6, 16)
    real = torch.tensor([True, False, True, True, False, False], device=device)
    how = (
        {"given_VK": torch.randint(0, 16, (9, 3), generator=generator, device=device),
         "token_ids_T": torch.randint(0, 9, (6,), generator=generator, device=device)}
        if given else {"bias_E": torch.zeros(16, device=device)}
    )  # fmt: skip
    got, weights = pick_experts(logits, 3, 2.5, real_T=real, nowhere=16, **how)
    everywhere, same = pick_experts(logits, 3, 2.5, **how)
    assert torch.equal(got[real], everywhere[real])
    assert (got[~real] == 16).all()
    assert torch.equal(weights[real], same[real])


def test_both_or_neither_way_of_choosing_is_refused(device):
    with pytest.raises(ValueError, match="exactly one"):
        pick_experts(torch.zeros(1, 8, device=device), 2, 1.0)
