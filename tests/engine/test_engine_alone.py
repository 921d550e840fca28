"""One rank by itself: the tokens are the model's, whatever the chunking, the company and the lack of pages."""

import numpy as np
import pytest

from runtime.errors import EngineError
from tests.engine.harness import Harness
from tests.engine.hash_lm import EOS, PAGE_TOKENS, VOCAB, expected_logits, greedy


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 200])
def test_greedy_tokens_are_those_of_the_model_for_every_prompt_length(length):
    harness = Harness()
    prompt = prompt_of(length)
    harness.submit("r", prompt, max_tokens=40)
    harness.run()
    assert harness.tokens["r"] == greedy(prompt, 40)
    assert harness.finished["r"] == "length"
    harness.assert_empty()


@pytest.mark.parametrize("budget", [8, 9, 13, 64, 1000])
def test_chunk_sizes_and_company_change_nothing(budget):
    harness = Harness(max_num_batched_tokens=budget, num_pages=200)
    prompts = {f"r{i}": prompt_of(5 + 17 * i, seed=i) for i in range(12)}
    for request_id, prompt in prompts.items():
        harness.submit(request_id, prompt, max_tokens=20)
    harness.run()
    for request_id, prompt in prompts.items():
        assert harness.tokens[request_id] == greedy(prompt, 20), request_id
    harness.assert_empty()


def test_no_step_exceeds_its_token_budget():
    harness = Harness(max_num_batched_tokens=40, num_pages=200)
    for i in range(20):
        harness.submit(f"r{i}", prompt_of(60 + i, seed=i), max_tokens=10)
    harness.run()
    assert max(sum(batch) for batch in harness.model.batches) <= 40
    assert any(1 in batch and max(batch) > 1 for batch in harness.model.batches), "decode and prefill were never mixed"


def test_tokens_with_few_pages_equal_tokens_with_many():
    prompts = {f"r{i}": prompt_of(20 + 3 * i, seed=i) for i in range(8)}
    harness = Harness(num_pages=16, max_model_len=250)
    for request_id, prompt in prompts.items():
        harness.submit(request_id, prompt, max_tokens=60)
    harness.run()
    assert harness.engine.stats().preemptions > 3
    for request_id, prompt in prompts.items():
        assert harness.tokens[request_id] == greedy(prompt, 60), request_id
        assert len(harness.messages[request_id]) == 60, "a token was sent twice or lost"
    harness.assert_empty()


def test_the_oldest_request_is_never_preempted():
    harness = Harness(num_pages=8, max_model_len=8 * PAGE_TOKENS)
    for i in range(4):
        harness.submit(f"r{i}", prompt_of(16, seed=i), max_tokens=100)
    order = []
    while harness.engine.has_work or not order:
        harness.step()
        order += [request_id for request_id in harness.finished if request_id not in order]
    assert order == ["r0", "r1", "r2", "r3"]
    assert harness.engine.stats().preemptions > 0


def test_a_request_alone_may_fill_every_page():
    harness = Harness(num_pages=8, max_model_len=8 * PAGE_TOKENS)
    prompt = prompt_of(16)
    harness.submit("r", prompt, max_tokens=1000)
    harness.run()
    assert len(harness.tokens["r"]) == 8 * PAGE_TOKENS - 16
    assert harness.tokens["r"] == greedy(prompt, len(harness.tokens["r"]))
    assert harness.finished["r"] == "length"


def test_eos_ends_a_request_and_is_sent():
    prompt = next(
        prompt
        for seed in range(1000)
        if EOS in greedy(prompt := prompt_of(10, seed), 12) and greedy(prompt, 1) != [EOS]
    )
    reference = greedy(prompt, 12)
    harness = Harness()
    harness.submit("r", prompt, max_tokens=100, ignore_eos=False)
    harness.submit("on", prompt, max_tokens=12, ignore_eos=True)
    harness.run()
    assert harness.tokens["r"] == reference[: reference.index(EOS) + 1]
    assert harness.finished["r"] == "stop"
    assert harness.messages["r"][-1].stop_token_id is None
    assert harness.tokens["on"] == reference


def test_a_stop_id_ends_a_request_and_is_named():
    prompt = prompt_of(10)
    reference = greedy(prompt, 20)
    stop = reference[6]
    harness = Harness()
    harness.submit("r", prompt, max_tokens=100, stop_token_ids=(stop,))
    harness.run()
    assert harness.tokens["r"] == reference[: reference.index(stop) + 1]
    assert (harness.finished["r"], harness.messages["r"][-1].stop_token_id) == ("stop", stop)


def test_prompt_counts_come_with_the_first_and_the_last_token():
    harness = Harness()
    harness.submit("r", prompt_of(21), max_tokens=5)
    harness.run()
    assert [message.prompt_tokens for message in harness.messages["r"]] == [21, 0, 0, 0, 21]


def test_a_resumed_stream_continues_where_it_stopped():
    prompt = prompt_of(30)
    reference = greedy(prompt, 25)
    harness = Harness()
    harness.submit("r", prompt, generated=reference[:10], max_tokens=25)
    harness.run()
    assert harness.tokens["r"] == reference[10:]
    assert harness.messages["r"][0].prompt_tokens == 30


def test_an_abort_in_any_step_gives_everything_back():
    for steps in range(12):
        harness = Harness(max_num_batched_tokens=8)
        harness.submit("stays", prompt_of(20, seed=1), max_tokens=30)
        harness.submit("goes", prompt_of(40), max_tokens=10)
        for _ in range(steps):
            harness.step()
        harness.engine.abort("goes")
        harness.engine.check_integrity()
        harness.run()
        assert harness.tokens["stays"] == greedy(prompt_of(20, seed=1), 30)
        assert "goes" not in harness.finished
        harness.assert_empty()


def test_priority_goes_before_arrival():
    harness = Harness(max_num_seqs=1, max_num_batched_tokens=64)
    for request_id, priority in (("late", 5), ("normal", 0), ("first", -1)):
        harness.submit(request_id, prompt_of(4), priority=priority, max_tokens=2)
    harness.run()
    assert list(harness.finished) == ["first", "normal", "late"]


def test_a_failed_step_fails_its_requests_and_no_others():
    harness = Harness(max_num_seqs=2)
    for i in range(4):
        harness.submit(f"r{i}", prompt_of(8, seed=i), max_tokens=4)
    harness.model.fail_next = 1
    harness.run()
    assert sorted(harness.failures) == ["r0", "r1"]
    assert all(failure.kind == "internal" and "on fire" in failure.message for failure in harness.failures.values())
    assert harness.tokens["r3"] == greedy(prompt_of(8, seed=3), 4)
    harness.assert_empty()


def test_failing_again_and_again_ends_the_engine_with_the_error():
    harness = Harness(max_num_seqs=1, max_step_failures=3)
    for i in range(5):
        harness.submit(f"r{i}", prompt_of(8, seed=i))
    harness.model.fail_next = 5
    harness.step()
    harness.step()
    with pytest.raises(EngineError, match=r"3 steps in a row failed.*on fire"):
        harness.step()


def test_a_model_that_returns_nan_fails_only_that_request():
    harness = Harness()
    good, bad = prompt_of(8), prompt_of(30, seed=5)
    real = HarnessForward(harness.model, poison=len(bad))
    harness.engine._runner._forward = real
    harness.submit("good", good, max_tokens=4)
    harness.submit("bad", bad, max_tokens=4)
    harness.run()
    assert harness.tokens["good"] == greedy(good, 4)
    assert "not finite" in harness.failures["bad"].message
    harness.assert_empty()


class HarnessForward:
    """The stand-in with a fault: NaN logits for sequences of one length."""

    def __init__(self, model, poison):
        self._model, self._poison = model, poison

    def __call__(self, batch):
        logits = self._model(batch)
        ends = batch.positions[batch.logits_rows] + 1
        logits[ends == self._poison] = float("nan")
        return logits


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [5, VOCAB]}, f"token id {VOCAB} is outside the vocabulary"),
        ({"prompt": [5, -1]}, "token id -1"),
        ({"prompt": [5] * 256}, "256 tokens and the model's limit is 256"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"logit_bias": ((VOCAB, 1.0),)}, "outside the vocabulary"),
        ({"allowed_token_ids": (-3,)}, "token id -3"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"constraint": b"x"}, "structured output"),
        ({"generated": (4, 5), "max_tokens": 2}, "already generated"),
    ],
)
def test_bad_requests_are_refused_with_the_field_and_the_numbers(options, field):
    harness = Harness()
    harness.submit("r", options.pop("prompt", [5, 6]), **options)
    harness.run()
    assert harness.failures["r"].kind == "invalid"
    assert field in harness.failures["r"].message
    harness.assert_empty()


def test_the_queue_has_a_bound():
    harness = Harness(max_num_seqs=1, max_queued_requests=3)
    for i in range(5):
        harness.submit(f"r{i}", [3, 4, 5])
    harness.run()
    assert [request_id for request_id, failure in harness.failures.items() if failure.kind == "overloaded"] == [
        "r3",
        "r4",
    ]
    assert sorted(harness.finished) == ["r0", "r1", "r2"]


def test_draining_finishes_what_runs_and_refuses_the_rest():
    harness = Harness()
    harness.submit("r", prompt_of(5), max_tokens=6)
    harness.step()
    harness.engine.drain()
    harness.submit("late", prompt_of(5))
    harness.run()
    assert harness.finished["r"] == "length"
    assert harness.failures["late"].kind == "overloaded"
    assert [type(message).__name__ for message in harness.others] == ["Drained"]


def test_short_prompts_are_not_starved_by_long_ones():
    harness = Harness(max_num_batched_tokens=32, num_pages=100, max_model_len=512)
    harness.submit("long", prompt_of(500), max_tokens=2)
    harness.step()
    harness.submit("short", prompt_of(16, seed=1), max_tokens=1)
    harness.step()
    assert harness.finished.get("short") == "length"
    harness.run()
    assert harness.tokens["long"] == greedy(prompt_of(500), 2)


def test_the_stand_in_notices_a_foreign_page():
    harness = Harness()
    prompt = prompt_of(40)
    harness.submit("r", prompt, max_tokens=10)
    harness.step()
    page = harness.engine._live.get("r").owned.page_ids[0]
    harness.model.pages[page, 3] ^= 1
    harness.run()
    assert harness.tokens["r"][0] == int(np.argmax(expected_logits(prompt)))
    assert harness.tokens["r"] != greedy(prompt, 10)
