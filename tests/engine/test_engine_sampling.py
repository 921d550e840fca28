"""Sampling as a caller sees it: every option end to end through the engine, also across preemption."""

import numpy as np
import pytest

from runtime.errors import RequestError
from tests.engine.harness import Harness
from tests.engine.hash_lm import EOS, VOCAB, expected_logits, greedy


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def run_one(prompt, **options):
    harness = Harness()
    harness.submit("r", prompt, **options)
    harness.run()
    harness.assert_empty()
    return harness


@pytest.mark.parametrize("count", [0, 3, -1])
def test_logprobs_come_with_every_token(count):
    prompt = prompt_of(12)
    harness = run_one(prompt, max_tokens=6, logprobs=count, temperature=0.9, seed=5)
    tokens = harness.tokens["r"]
    for index, message in enumerate(harness.messages["r"]):
        (entry,) = message.logprobs
        wanted = log_softmax(expected_logits(prompt + tokens[:index]))
        assert entry.token_id == tokens[index]
        assert entry.logprob == pytest.approx(wanted[tokens[index]], abs=1e-5)
        assert entry.rank == 1 + int((wanted > wanted[tokens[index]]).sum())
        order = np.argsort(-wanted, kind="stable")[: VOCAB if count < 0 else count].tolist()
        assert list(entry.top_ids) == order
        assert entry.top_logprobs == pytest.approx(wanted[order], abs=1e-5)


@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_prompt_logprobs_come_with_the_first_token(length):
    prompt = prompt_of(length)
    harness = Harness(max_num_batched_tokens=24)
    harness.submit("other", prompt_of(30, seed=1), max_tokens=10)
    harness.submit("r", prompt, max_tokens=3, prompt_logprobs=2)
    harness.run()
    first, *rest = harness.messages["r"]
    assert all(message.prompt_logprobs is None for message in rest)
    assert len(first.prompt_logprobs) == length
    assert first.prompt_logprobs[0] is None
    for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
        wanted = log_softmax(expected_logits(prompt[:position]))
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(wanted[prompt[position]], abs=1e-5)
        assert len(entry.top_ids) == 2


def test_prompt_logprobs_survive_a_preemption_in_the_middle():
    prompt = prompt_of(100, seed=1)
    harness = Harness(num_pages=10, max_model_len=160, max_num_seqs=2, max_num_batched_tokens=4)
    harness.submit("old", prompt_of(30, seed=9), max_tokens=100)
    harness.submit("young", prompt, max_tokens=5, prompt_logprobs=1)
    harness.run()
    assert harness.engine.stats().preemptions > 0
    found = harness.messages["young"][0].prompt_logprobs
    assert [entry.token_id for entry in found[1:]] == prompt[1:]


def test_seeded_streams_with_penalties_are_the_same_alone_in_company_and_after_preemption():
    options = {
        f"r{i}": {
            "temperature": 1.0, "seed": 100 + i, "top_p": 0.9, "presence_penalty": 0.4 * i,
            "frequency_penalty": 0.3, "repetition_penalty": 1.1, "bad_words": ((7,), (8, 9)), "min_tokens": 10,
            "ignore_eos": False, "max_tokens": 60,
        }
        for i in range(6)
    }  # fmt: skip
    prompts = {name: prompt_of(20 + i, seed=i) for i, name in enumerate(options)}
    alone = {name: run_one(prompts[name], **options[name]).tokens["r"] for name in options}
    crowded = Harness(num_pages=14, max_model_len=200)
    for name in options:
        crowded.submit(name, prompts[name], **options[name])
    crowded.run()
    assert crowded.engine.stats().preemptions > 0
    assert crowded.tokens == alone
    assert all(len(tokens) >= 10 and 7 not in tokens for tokens in alone.values())


def test_min_tokens_keeps_eos_and_stop_ids_away():
    prompt = next(prompt for seed in range(5000) if greedy(prompt := prompt_of(7, seed), 1) == [EOS])
    assert run_one(prompt, max_tokens=9, ignore_eos=False).tokens["r"] == [EOS]
    harness = run_one(prompt, max_tokens=9, min_tokens=5, ignore_eos=False)
    assert EOS not in harness.tokens["r"][:5]
    reference = greedy(prompt_of(10), 20)
    stopped = run_one(prompt_of(10), max_tokens=20, stop_token_ids=(reference[2],), min_tokens=8)
    assert reference[2] not in stopped.tokens["r"][:8]


def test_bias_and_allowed_ids_steer_a_greedy_stream():
    assert set(run_one(prompt_of(9), max_tokens=12, allowed_token_ids=(20, 21, 22)).tokens["r"]) <= {20, 21, 22}
    assert set(run_one(prompt_of(9), max_tokens=5, logit_bias=((33, 100.0),)).tokens["r"]) == {33}


def test_a_request_without_any_allowed_token_fails_alone():
    harness = Harness()
    harness.submit("none", prompt_of(5), allowed_token_ids=(9,), bad_words=((9,),))
    harness.submit("fine", prompt_of(6), max_tokens=5)
    harness.run()
    assert harness.failures["none"].kind == "invalid"
    assert "no token satisfies" in harness.failures["none"].message
    assert harness.tokens["fine"] == greedy(prompt_of(6), 5)


class Counting:
    """A grammar that wants its ids in turn, then ends; it can be told to break."""

    def __init__(self, spec):
        if spec == b"bad":
            raise RequestError("not a grammar", param="response_format")
        self.wanted = [10, 11, 12, 13]
        self.breaks = spec

    @property
    def is_done(self):
        return not self.wanted

    def fill_bitmask(self, row):
        if self.breaks == b"fill":
            raise RuntimeError("broken grammar")
        row[:] = 0
        row.view(np.uint32)[self.wanted[0] // 32] = np.uint32(1 << (self.wanted[0] % 32))

    def accept(self, token_id):
        if self.breaks == b"accept" or token_id != self.wanted[0]:
            raise RuntimeError("broken grammar")
        self.wanted.pop(0)


def test_a_grammar_binds_every_token_and_ends_the_request():
    harness = Harness(constraints=Counting)
    harness.submit("free", prompt_of(8), max_tokens=6)
    harness.submit("bound", prompt_of(9), max_tokens=50, constraint=b"ok")
    harness.submit("resumed", prompt_of(9), generated=[10, 11], max_tokens=50, constraint=b"ok")
    harness.submit("limited", prompt_of(9), allowed_token_ids=tuple(range(5, 13)), max_tokens=50, constraint=b"ok")
    harness.run()
    assert (harness.tokens["bound"], harness.finished["bound"]) == ([10, 11, 12, 13], "stop")
    assert harness.tokens["resumed"] == [12, 13]
    assert harness.tokens["free"] == greedy(prompt_of(8), 6)
    assert "no token satisfies" in harness.failures["limited"].message


def test_a_grammar_follows_its_request_through_preemption():
    harness = Harness(constraints=Counting, num_pages=4, max_model_len=64, max_num_batched_tokens=16)
    harness.submit("old", prompt_of(15), max_tokens=40)
    harness.submit("bound", prompt_of(31), max_tokens=50, constraint=b"ok")
    harness.run()
    assert harness.tokens["bound"] == [10, 11, 12, 13]
    assert harness.tokens["old"] == greedy(prompt_of(15), 40)


@pytest.mark.parametrize("spec", [b"fill", b"accept", b"bad"])
def test_a_broken_grammar_fails_its_own_request_only(spec):
    harness = Harness(constraints=Counting)
    harness.submit("fine", prompt_of(8), max_tokens=6)
    harness.submit("broken", prompt_of(9), max_tokens=6, constraint=spec)
    harness.run()
    assert harness.tokens["fine"] == greedy(prompt_of(8), 6)
    assert "broken" in harness.failures
    harness.assert_empty()


def test_a_resumed_stream_that_leaves_its_grammar_is_refused():
    harness = Harness(constraints=Counting)
    harness.submit("r", prompt_of(8), generated=[10, 50], max_tokens=6, constraint=b"ok")
    harness.run()
    assert "do not follow the grammar" in harness.failures["r"].message
