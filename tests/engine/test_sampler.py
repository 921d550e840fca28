"""The batched sampler against a plain twin that takes one row at a time, and its statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import Request
from engine.sampler import logprobs_of, sample
from engine.sampling_rows import SamplingRows
from engine.uniform import uniform
from tests.engine.harness import submit

VOCAB = 41
EOS = 1


class BitMatcher:
    """A grammar that allows a fixed set of ids."""

    is_done = False

    def __init__(self, allowed):
        self.allowed = allowed

    def fill_bitmask(self, row):
        row[:] = 0
        words = row.view(np.uint32)
        for token_id in self.allowed:
            words[token_id // 32] |= np.uint32(1 << (token_id % 32))

    def accept(self, token_id):
        assert token_id in self.allowed


def request_of(index, prompt=(2, 3), generated=(), allowed_by_grammar=None, **sampling):
    sampling.setdefault("max_tokens", 1000)
    matcher = None if allowed_by_grammar is None else BitMatcher(allowed_by_grammar)
    return Request(submit(f"r{index}", prompt, generated=generated, **sampling), index, matcher)


def run_batch(requests, logits):
    rows = SamplingRows(len(requests), VOCAB, (EOS,), torch.device("cpu"))
    for row, request in enumerate(requests):
        rows.add(row, request)
    counts = np.array([len(request.generated) for request in requests])
    return sample(logits.clone(), rows.inputs(requests, counts))


def constrained(request, logits):
    """float64 logits of one row after everything but temperature and truncation, written as plainly as can be."""
    s = request.sampling
    logits = [float(value) for value in logits]
    if request.matcher is not None:
        logits = [value if i in request.matcher.allowed else -math.inf for i, value in enumerate(logits)]
    if s.allowed_token_ids:
        logits = [value if i in s.allowed_token_ids else -math.inf for i, value in enumerate(logits)]
    for token_id, bias in s.logit_bias:
        logits[token_id] += bias
    for i in range(VOCAB):
        count = request.generated.count(i)
        if count or i in request.prompt.tolist():
            logits[i] = logits[i] / s.repetition_penalty if logits[i] > 0 else logits[i] * s.repetition_penalty
        logits[i] -= s.frequency_penalty * count + s.presence_penalty * (count > 0)
    for word in s.bad_words:
        if len(word) == 1 or request.generated[-len(word) + 1 :] == list(word[:-1]):
            logits[word[-1]] = -math.inf
    if len(request.generated) < s.min_tokens:
        for token_id in (*s.stop_token_ids, *(() if s.ignore_eos else (EOS,))):
            logits[token_id] = -math.inf
    return logits


def distribution(request, logits):
    """Probabilities that one row is drawn from."""
    s = request.sampling
    logits = constrained(request, logits)
    if s.temperature < 1e-5:
        best = logits.index(max(logits))
        return [float(i == best) for i in range(VOCAB)]
    top = max(logits)
    scaled = [(value - top) / s.temperature for value in logits]
    kept = [value for value in scaled if value > -math.inf and (not s.min_p or value >= math.log(s.min_p))]
    ordered = sorted(kept, reverse=True)
    if s.top_k:
        ordered = ordered[: s.top_k]
    total = sum(math.exp(value) for value in ordered)
    reached, bound = 0.0, ordered[0]
    for value in ordered:
        if reached >= s.top_p * total:
            break
        bound = value
        reached += math.exp(value)
    if not s.min_p and not s.top_k and s.top_p == 1:
        bound = -math.inf
    weights = [math.exp(value) if value >= bound and value in kept else 0.0 for value in scaled]
    return [weight / sum(weights) for weight in weights]


def expected_token(request, logits):
    """Inverse of the cumulative distribution, in order of ids, at the request's own uniform number."""
    u = float(uniform(np.array([request.seed], np.uint64), np.array([len(request.generated)]))[0])
    reached = 0.0
    for token_id, probability in enumerate(distribution(request, logits)):
        reached += probability
        if probability and u < reached:
            return token_id
    return token_id


ids = st.integers(0, VOCAB - 1)
biases = st.lists(st.tuples(ids, st.sampled_from([-100.0, 2.0])), max_size=3, unique_by=lambda pair: pair[0])
sampling = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "seed": st.integers(0, 2**63 - 1),
    },
    optional={
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 100]),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "presence_penalty": st.sampled_from([-1.5, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.7]),
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "logit_bias": biases.map(tuple),
        "allowed_token_ids": st.sets(ids, min_size=6, max_size=12).map(tuple),
        "bad_words": st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(ids, max_size=2).map(tuple),
        "ignore_eos": st.booleans(),
        "prompt": st.lists(ids, min_size=1, max_size=6),
        "generated": st.lists(ids, max_size=6),
        "allowed_by_grammar": st.sets(ids, min_size=20),
    },
)


@settings(deadline=None, max_examples=100)
@given(st.lists(sampling, min_size=1, max_size=9), st.integers(0, 2**32))
def test_any_mix_of_requests_draws_what_each_would_draw_alone(options, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(options), VOCAB, generator=generator) * 3
    requests = [request_of(index, **given_options) for index, given_options in enumerate(options)]
    sampled = run_batch(requests, logits)
    for row, request in enumerate(requests):
        allowed = constrained(request, logits[row].tolist())
        if max(allowed) == -math.inf:
            assert sampled.best[row] == -math.inf
            continue
        token_id = int(sampled.token_ids[row])
        probabilities = distribution(request, logits[row].tolist())
        assert probabilities[token_id] > 0
        # Float32 cannot decide a draw that falls on the edge between two ids; everywhere else the ids are equal.
        u = float(uniform(np.array([request.seed], np.uint64), np.array([len(request.generated)]))[0])
        edge = min(abs(u - reached) for reached in np.cumsum(probabilities))
        assert token_id == expected_token(request, logits[row].tolist()) or edge < 1e-5
        alone = run_batch([request], logits[row : row + 1])
        assert int(alone.token_ids[0]) == token_id


def test_equal_logits_go_to_the_lowest_id_when_greedy():
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 9, 30]] = 5.0
    assert run_batch([request_of(0)], logits).token_ids.tolist() == [7]


def test_equal_logits_stand_or_fall_together_under_truncation():
    logits = torch.zeros(1, VOCAB)
    logits[0, [4, 8, 15]] = 6.0
    drawn = {
        int(run_batch([request_of(0, temperature=1.0, top_k=2, seed=seed)], logits).token_ids[0]) for seed in range(200)
    }
    assert drawn == {4, 8, 15}


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, VOCAB, generator=generator) * 2
    requests = [request_of(0, temperature=0.8, top_p=0.9, seed=seed) for seed in range(20_000)]
    drawn = run_batch(requests, logits.expand(len(requests), -1)).token_ids
    seen = np.bincount(drawn.numpy(), minlength=VOCAB)
    wanted = np.array(distribution(requests[0], logits[0].tolist())) * len(requests)
    assert not seen[wanted == 0].any()
    chi2 = ((seen - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    freedom = (wanted > 0).sum() - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_uniform_numbers_are_uniform_and_independent_of_seed_and_index_order():
    seeds = np.arange(200, dtype=np.uint64).repeat(200)
    indices = np.tile(np.arange(200), 200)
    u = uniform(seeds, indices)
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005
    assert len(np.unique(u)) == len(u)
    grid = u.reshape(200, 200)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02, "neighbouring seeds are related"
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02, "neighbouring tokens are related"
    order = np.random.default_rng(0).permutation(len(u))
    assert np.array_equal(uniform(seeds[order], indices[order]), u[order])


def test_the_largest_uniform_number_still_finds_a_token():
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 3] = 1.0
    requests = [request_of(0, temperature=1.0, seed=seed) for seed in range(50)]
    assert set(run_batch(requests, logits.expand(50, -1)).token_ids.tolist()) == {3}


@pytest.mark.parametrize("count", [0, 1, 5, VOCAB])
def test_logprobs_are_those_of_the_raw_logits(count):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([0, 17, 40])
    got = logprobs_of(logits, targets, count)
    wanted = logits.log_softmax(-1)
    assert torch.allclose(got.logprob, wanted.gather(-1, targets[:, None])[:, 0], atol=1e-6)
    for row in range(3):
        order = sorted(range(VOCAB), key=lambda i: -float(logits[row, i]))
        assert got.top_ids[row].tolist() == order[:count]
        assert order[int(got.rank[row]) - 1] == int(targets[row])
        assert torch.allclose(got.top_logprobs[row], wanted[row, order[:count]], atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_logprobs_of_a_row_do_not_depend_on_how_many_rows_there_are(device):
    rows, vocab = (300, 129_280) if device == "cuda" else (9, 4_099)
    logits = 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)).to(device)
    targets = torch.arange(rows, device=device)
    together = logprobs_of(logits, targets, 5)
    for count in (1, 2, 5, rows // 2):
        few = logprobs_of(logits[:count], targets[:count], 5)
        assert torch.equal(few.logprob, together.logprob[:count])
        assert torch.equal(few.top_logprobs, together.top_logprobs[:count])
    exact = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    # One rounding to float32, and what the float32 exponentials leave in their sum.
    assert torch.allclose(together.logprob.double(), exact, rtol=2**-24, atol=3e-7)


def test_logprobs_of_constrained_rows_are_still_of_the_raw_logits():
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(3))
    best = int(logits[0].argmax())
    requests = [request_of(0, logprobs=2, bad_words=((best,),)), request_of(1)]
    sampled = run_batch(requests, logits)
    assert int(sampled.token_ids[0]) != best
    assert sampled.logprobs.top_ids[0].tolist()[0] == best
    assert int(sampled.logprobs.rank[0]) == 2


def test_rows_that_move_keep_their_parameters():
    """Removing rows in any order leaves every other request with its own parameters and counts."""
    generator = torch.Generator().manual_seed(5)
    options = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3, "frequency_penalty": 1.0, "generated": [5, 5, 6]},
        {"temperature": 0.7, "seed": 4, "top_k": 3},
        {"temperature": 1.0, "seed": 5, "repetition_penalty": 2.0, "prompt": [8, 9]},
        {"temperature": 1.2, "seed": 6, "min_p": 0.2, "presence_penalty": 0.5, "generated": [7]},
    ]
    rows = SamplingRows(len(options), VOCAB, (EOS,), torch.device("cpu"))
    requests = [request_of(index, **given_options) for index, given_options in enumerate(options)]
    for row, request in enumerate(requests):
        rows.add(row, request)
    for victim in (1, 0, 2):
        last = len(requests) - 1
        rows.remove(victim, last)
        requests[victim] = requests[last]
        requests.pop()
        logits = torch.randn(len(requests), VOCAB, generator=generator) * 2
        counts = np.array([len(request.generated) for request in requests])
        inputs = rows.inputs(requests, counts)
        sampled = sample(logits.clone(), inputs)
        for row, request in enumerate(requests):
            assert int(sampled.token_ids[row]) == int(run_batch([request], logits[row : row + 1]).token_ids[0])
        rows.record(inputs, sampled.token_ids)
        for request, token_id in zip(requests, sampled.token_ids.tolist(), strict=True):
            request.generated.append(token_id)
