"""Prefill here, decode there: the tokens of a single process, and every page back in every ending."""

import numpy as np
import pytest

from runtime.requests import ReceiveState, SendState
from tests.engine.harness import Harness
from tests.engine.hash_lm import EOS, PAGE_TOKENS, VOCAB, greedy
from tests.engine.wire import Wire, WireConnector


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


class Pair:
    """A prefill engine and a decode engine on one wire."""

    def __init__(self, *, prefill=None, decode=None):
        self.wire = Wire()
        self.prefill = self._end(prefill or {})
        self.decode = self._end(decode or {})

    def _end(self, settings):
        connector = WireConnector(self.wire)
        harness = Harness(connector=connector, **settings)
        connector.model = harness.model
        return harness

    def submit(self, name, prompt, *, legs="pd", **options):
        if "p" in legs:
            self.prefill.submit(f"p-{name}", prompt, handoff=SendState(transfer_id=name), **options)
        if "d" in legs:
            handoff = ReceiveState(transfer_id=name, source_address="peer:1", source_epoch="")
            self.decode.submit(f"d-{name}", prompt, handoff=handoff, **options)

    def run(self, rounds=400):
        for _ in range(rounds):
            self.prefill.step()
            self.wire.pump()
            self.decode.step()
            if not (self.prefill.is_busy or self.decode.is_busy or self.wire.receives):
                return self
        raise AssertionError("never done")

    def assert_empty(self):
        self.prefill.step()
        self.decode.step()
        self.prefill.assert_empty()
        self.decode.assert_empty()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 100, 160])
def test_tokens_equal_those_of_one_process(length):
    pair = Pair()
    prompt = prompt_of(length)
    pair.submit("t", prompt, max_tokens=20)
    pair.run()
    reference = greedy(prompt, 20)
    assert pair.prefill.tokens["p-t"] == reference[:1]
    assert pair.prefill.finished["p-t"] == "length"
    assert pair.decode.tokens["d-t"] == reference
    assert pair.decode.messages["d-t"][0].prompt_tokens == length
    assert "d-t" in pair.decode.handovers
    pair.assert_empty()
    sent, received = pair.prefill.engine.stats(), pair.decode.engine.stats()
    assert sent.transfers_sent == received.transfers_received == 1
    assert received.tokens_asked_for == received.tokens_received == length
    assert sum(sent.inference_time.counts) == sum(received.inference_time.counts) == 1


def test_full_pages_are_announced_while_later_chunks_are_computed():
    pair = Pair(prefill={"max_num_batched_tokens": 24})
    pair.submit("t", prompt_of(100), legs="p")
    seen = []
    for _ in range(5):
        pair.prefill.step()
        seen.append(pair.prefill.connector.announced.get("t", 0))
    assert seen == [1, 3, 4, 6, 6], "the last page goes with send_ready"
    assert len(pair.wire.sends["t"]["pages"]) == 7


def test_many_transfers_with_preemption_on_the_decode_side():
    pair = Pair(decode={"num_pages": 16, "max_model_len": 250}, prefill={"max_held_requests": 3})
    prompts = {f"t{i}": prompt_of(15 + 7 * i, seed=i) for i in range(8)}
    for name, prompt in prompts.items():
        pair.submit(name, prompt, max_tokens=50)
    pair.run()
    assert pair.decode.engine.stats().preemptions > 0
    for name, prompt in prompts.items():
        assert pair.decode.tokens[f"d-{name}"] == greedy(prompt, 50), name
    pair.assert_empty()


def test_held_states_are_bounded_and_admission_goes_on_when_they_are_fetched():
    pair = Pair(prefill={"max_held_requests": 2})
    for i in range(5):
        pair.submit(f"t{i}", prompt_of(20, seed=i), legs="p")
    pair.prefill.run()
    assert sorted(pair.prefill.finished) == ["p-t0", "p-t1"]
    assert pair.prefill.engine.stats().held == 2
    pair.wire.end_send("t0", "fetched")
    pair.prefill.run()
    assert sorted(pair.prefill.finished) == ["p-t0", "p-t1", "p-t2"]


def test_an_eos_as_first_token_is_held_and_ends_the_decode_leg():
    prompt = next(prompt for seed in range(5000) if greedy(prompt := prompt_of(7, seed), 1) == [EOS])
    pair = Pair()
    pair.submit("t", prompt, max_tokens=20, ignore_eos=False)
    pair.run()
    assert (pair.prefill.tokens["p-t"], pair.prefill.finished["p-t"]) == ([EOS], "stop")
    assert (pair.decode.tokens["d-t"], pair.decode.finished["d-t"]) == ([EOS], "stop")
    pair.assert_empty()


def test_one_token_asked_for_is_one_token():
    pair = Pair()
    pair.submit("t", prompt_of(PAGE_TOKENS), max_tokens=1)
    pair.run()
    assert (len(pair.decode.tokens["d-t"]), pair.decode.finished["d-t"]) == (1, "length")
    pair.assert_empty()


def test_min_tokens_and_logprobs_reach_over_the_handoff():
    prompt = next(prompt for seed in range(5000) if greedy(prompt := prompt_of(7, seed), 1) == [EOS])
    pair, alone = Pair(), Harness()
    options = {"max_tokens": 6, "min_tokens": 4, "ignore_eos": False, "logprobs": 3, "prompt_logprobs": 2}
    pair.submit("t", prompt, **options)
    alone.submit("r", prompt, **options)
    pair.run()
    alone.run()
    assert pair.decode.tokens["d-t"] == alone.tokens["r"]
    assert len(alone.tokens["r"]) >= 4
    assert [m.logprobs for m in pair.decode.messages["d-t"]] == [m.logprobs for m in alone.messages["r"]]
    assert pair.decode.messages["d-t"][0].prompt_logprobs == alone.messages["r"][0].prompt_logprobs


def test_seeded_sampling_gives_one_stream_across_the_handoff():
    prompt = prompt_of(33)
    pair, alone = Pair(), Harness()
    options = {"max_tokens": 30, "temperature": 1.0, "top_p": 0.95, "seed": 1234, "repetition_penalty": 1.2}
    pair.submit("t", prompt, **options)
    alone.submit("r", prompt, **options)
    pair.run()
    alone.run()
    assert pair.decode.tokens["d-t"] == alone.tokens["r"]


def test_a_resumed_stream_is_handed_over_with_its_tokens():
    prompt = prompt_of(30)
    reference = greedy(prompt, 25)
    pair = Pair()
    pair.submit("t", prompt, generated=reference[:10], max_tokens=25)
    pair.run()
    assert pair.decode.tokens["d-t"] == reference[10:]


@pytest.mark.parametrize("retryable", [True, False])
@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_receive_that_fails_follows_the_policy_and_its_late_read_hurts_nobody(policy, retryable):
    pair = Pair(decode={"kv_load_failure_policy": policy, "num_pages": 20})
    prompt, other = prompt_of(50), prompt_of(60, seed=1)
    pair.submit("t", prompt, legs="d", max_tokens=20)
    pair.decode.step()
    pair.wire.fail("t", retryable=retryable)
    pair.decode.submit("other", other, max_tokens=20)
    pair.decode.run()
    assert pair.decode.engine.stats().pages_quarantined == 4
    pair.decode.connector.quiet("t")
    pair.decode.run()
    if policy == "recompute" and retryable:
        assert pair.decode.tokens["d-t"] == greedy(prompt, 20)
        assert pair.decode.engine.stats().recomputed == 1
    else:
        assert pair.decode.failures["d-t"].kind == "transfer"
    assert pair.decode.tokens["other"] == greedy(other, 20)
    pair.decode.assert_empty()


def test_pages_of_an_aborted_receive_come_back_only_when_it_is_quiet():
    pair = Pair()
    pair.submit("t", prompt_of(50), legs="d")
    pair.decode.step()
    pair.decode.engine.abort("d-t")
    pair.decode.run()
    assert pair.decode.engine.stats().pages_quarantined == 4
    pair.decode.connector.quiet("t")
    pair.decode.run()
    pair.decode.assert_empty()


def test_a_received_that_was_under_way_when_its_request_was_aborted_counts_as_quiet():
    pair = Pair()
    pair.submit("t", prompt_of(50))
    pair.decode.step()
    pair.prefill.run()
    pair.wire.pump()
    pair.decode.engine.abort("d-t")
    pair.run()
    assert "d-t" not in pair.decode.tokens
    pair.assert_empty()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_an_aborted_prefill_keeps_its_pages_until_its_transfer_has_ended(steps):
    pair = Pair(prefill={"max_num_batched_tokens": 24})
    pair.submit("t", prompt_of(100), legs="p")
    for _ in range(steps):
        pair.prefill.step()
    pair.prefill.engine.abort("p-t")
    pair.prefill.engine.check_integrity()
    if steps:
        assert pair.prefill.engine.stats().held == 1
    else:
        assert pair.prefill.connector.released == ["t"], "a claim that waits must hear of it"
    pair.prefill.step()
    pair.prefill.assert_empty()


def test_an_abort_after_the_answer_leaves_the_held_state_alone():
    pair = Pair()
    pair.submit("t", prompt_of(20), max_tokens=10)
    pair.prefill.run()
    pair.prefill.engine.abort("p-t")
    pair.run()
    assert pair.decode.tokens["d-t"] == greedy(prompt_of(20), 10)


def test_a_release_while_computing_or_held_frees_the_prefill_side():
    for steps in range(7):
        pair = Pair(prefill={"max_num_batched_tokens": 24})
        pair.submit("t", prompt_of(100), legs="p")
        for _ in range(steps):
            pair.prefill.step()
        pair.prefill.engine.release("t")
        pair.prefill.run()
        assert ("p-t" in pair.prefill.failures) == (steps < 5)
        pair.assert_empty()


def test_a_leg_that_comes_after_its_release_is_refused():
    pair = Pair()
    pair.prefill.engine.release("t")
    pair.submit("t", prompt_of(20), legs="p")
    pair.prefill.run()
    assert pair.prefill.failures["p-t"].kind == "transfer"
    assert "released" in pair.prefill.failures["p-t"].message


def test_a_transfer_id_in_use_is_refused():
    pair = Pair()
    pair.submit("t", prompt_of(20), legs="p")
    pair.prefill.submit("again", prompt_of(20), handoff=SendState(transfer_id="t"))
    pair.prefill.run()
    assert "already in use" in pair.prefill.failures["again"].message
    assert pair.prefill.finished["p-t"] == "length"


def test_a_rank_without_transfers_refuses_handoffs():
    harness = Harness()
    harness.submit("r", prompt_of(20), handoff=SendState(transfer_id="t"))
    harness.run()
    assert "no transfers" in harness.failures["r"].message


def test_a_failed_step_gives_up_the_sends_in_it():
    pair = Pair(prefill={"max_num_batched_tokens": 24})
    pair.submit("t", prompt_of(100), legs="p")
    pair.prefill.step()
    pair.prefill.model.fail_next = 1
    pair.prefill.run()
    assert pair.prefill.failures["p-t"].kind == "internal"
    pair.prefill.assert_empty()


def test_draining_waits_for_what_is_promised():
    pair = Pair()
    pair.submit("t", prompt_of(20), max_tokens=5)
    pair.prefill.step()
    pair.prefill.engine.drain()
    pair.prefill.run()
    assert not pair.prefill.others
    pair.run()
    pair.prefill.step()
    assert [type(message).__name__ for message in pair.prefill.others] == ["Drained"]


def test_receives_wait_until_there_is_room():
    pair = Pair(decode={"num_pages": 8, "max_model_len": 8 * PAGE_TOKENS})
    for i in range(4):
        pair.submit(f"t{i}", prompt_of(50, seed=i), max_tokens=10)
    pair.decode.step()
    assert pair.decode.engine.stats().receiving == 1
    assert len(pair.wire.receives) == 1, "a waiting leg pins nothing"
    pair.run()
    for i in range(4):
        assert pair.decode.tokens[f"d-t{i}"] == greedy(prompt_of(50, seed=i), 10)
    pair.assert_empty()
