"""Steps that are launched before the last one's tokens are known, and steps padded to a captured shape: same tokens."""

import numpy as np
import pytest

from tests.engine import test_engine_alone as alone
from tests.engine import test_engine_sampling as sampling
from tests.engine import test_engine_transfers as transfers
from tests.engine.harness import MODES, Harness
from tests.engine.hash_lm import EOS, PAGE_TOKENS, greedy
from tests.engine.wire import Wire, WireConnector

SAME = [
    (alone.test_greedy_tokens_are_those_of_the_model_for_every_prompt_length, 33),
    (alone.test_chunk_sizes_and_company_change_nothing, 13),
    alone.test_no_step_exceeds_its_token_budget,
    alone.test_tokens_with_few_pages_equal_tokens_with_many,
    alone.test_the_oldest_request_is_never_preempted,
    alone.test_a_request_alone_may_fill_every_page,
    alone.test_eos_ends_a_request_and_is_sent,
    alone.test_a_stop_id_ends_a_request_and_is_named,
    alone.test_prompt_counts_come_with_the_first_and_the_last_token,
    alone.test_a_resumed_stream_continues_where_it_stopped,
    alone.test_an_abort_in_any_step_gives_everything_back,
    (transfers.test_tokens_equal_those_of_one_process, 33),
    transfers.test_many_transfers_with_preemption_on_the_decode_side,
    transfers.test_an_eos_as_first_token_is_held_and_ends_the_decode_leg,
    transfers.test_one_token_asked_for_is_one_token,
    transfers.test_min_tokens_and_logprobs_reach_over_the_handoff,
    transfers.test_seeded_sampling_gives_one_stream_across_the_handoff,
    transfers.test_a_resumed_stream_is_handed_over_with_its_tokens,
    (sampling.test_logprobs_come_with_every_token, 3),
    (sampling.test_prompt_logprobs_come_with_the_first_token, 40),
    sampling.test_prompt_logprobs_survive_a_preemption_in_the_middle,
    sampling.test_min_tokens_keeps_eos_and_stop_ids_away,
    sampling.test_bias_and_allowed_ids_steer_a_greedy_stream,
    sampling.test_a_request_without_any_allowed_token_fails_alone,
    sampling.test_a_grammar_binds_every_token_and_ends_the_request,
    sampling.test_a_grammar_follows_its_request_through_preemption,
]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "in turn"])
@pytest.mark.parametrize("case", SAME, ids=lambda case: getattr(case, "__name__", None) or case[0].__name__)
def test_what_holds_in_turn_holds_ahead_and_padded(monkeypatch, case, mode):
    monkeypatch.setattr(Harness, "mode", mode)
    test, *arguments = case if isinstance(case, tuple) else (case,)
    test(*arguments)


@pytest.mark.parametrize("mode", ["ahead", "ahead and padded"])
def test_seeded_streams_with_penalties_stay_the_same(monkeypatch, mode):
    monkeypatch.setattr(Harness, "mode", mode)
    sampling.test_seeded_streams_with_penalties_are_the_same_alone_in_company_and_after_preemption()


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(Harness, "mode", "ahead of a late device")


def prompt_ending_with_eos(after):
    """A prompt whose greedy answer has its first EOS at index `after`."""
    for seed in range(5000):
        prompt = alone.prompt_of(10, seed=seed)
        tokens = greedy(prompt, after + 1)
        if tokens.index(EOS) == after if EOS in tokens else False:
            return prompt
    raise AssertionError("no such prompt")


def test_a_step_is_in_flight_while_the_next_one_is_launched(ahead):
    harness = Harness()
    harness.submit("r", alone.prompt_of(5), max_tokens=10)
    assert harness.step() == []
    for count in range(1, 10):
        harness.step()
        assert len(harness.tokens["r"]) == count, "one step late"
        assert harness.engine._flight is not None
    harness.step()
    assert harness.finished == {"r": "length"}
    assert harness.engine._flight is None
    assert len(harness.model.batches) == 10, "an end known beforehand costs no surplus step"
    harness.assert_empty()


def test_an_eos_is_seen_one_step_late_and_the_surplus_token_is_dropped(ahead):
    prompt = prompt_ending_with_eos(after=4)
    harness = Harness()
    harness.submit("r", prompt, max_tokens=30, ignore_eos=False)
    harness.run()
    assert harness.tokens["r"] == greedy(prompt, 5)
    assert harness.finished["r"] == "stop"
    assert len(harness.model.batches) == 6
    harness.assert_empty()


def test_memory_of_an_aborted_request_is_fenced_until_the_step_in_flight_has_ended(ahead):
    harness = Harness(num_pages=8, max_model_len=64)
    harness.submit("r", alone.prompt_of(20), max_tokens=30)
    for _ in range(3):
        harness.step()
    free = harness.engine.stats().pages_free
    harness.engine.abort("r")
    harness.engine.check_integrity()
    assert harness.engine.stats().pages_free == free, "the step in flight still writes to them"
    harness.step()
    harness.assert_empty()
    assert not harness.engine.has_work


def test_a_state_that_arrives_is_not_overwritten_by_a_step_in_flight(ahead):
    """An aborted request's pages go to a receive whose bytes arrive before the aborted one's surplus step has run."""
    wire = Wire()
    sender, receiver = WireConnector(wire), WireConnector(wire)
    prefill = Harness(connector=sender)
    decode = Harness(connector=receiver, num_pages=4, max_model_len=64)
    sender.model, receiver.model = prefill.model, decode.model
    prompt, other = alone.prompt_of(40, seed=1), alone.prompt_of(40, seed=2)
    prefill.submit("p", prompt, handoff=transfers.SendState(transfer_id="t"), max_tokens=8)
    prefill.run()
    decode.submit("old", other, max_tokens=8)
    for _ in range(3):
        decode.step()
    receive = transfers.ReceiveState(transfer_id="t", source_address="x:1", source_epoch="")
    decode.submit("new", prompt, handoff=receive, max_tokens=8)
    decode.engine.abort("old")
    for _ in range(40):
        decode.step()
        wire.pump()
        if "new" in decode.finished:
            break
    assert decode.tokens["new"] == greedy(prompt, 8)
    decode.run()
    decode.assert_empty()


def test_a_send_runs_in_no_step_after_its_prompt(ahead):
    wire = Wire()
    connector = WireConnector(wire)
    harness = Harness(connector=connector)
    connector.model = harness.model
    harness.submit("p", alone.prompt_of(20), handoff=transfers.SendState(transfer_id="t"), max_tokens=8)
    harness.submit("r", alone.prompt_of(9), max_tokens=12)
    harness.run()
    slot = wire.sends["t"]["slot"]
    assert harness.tokens["r"] == greedy(alone.prompt_of(9), 12)
    chain = harness.model.slots.numpy().view(np.uint64)[slot, 0]
    alone_harness = Harness()
    alone_harness.submit("a", alone.prompt_of(20), max_tokens=1)
    alone_harness.run()
    assert chain == alone_harness.model.slots.numpy().view(np.uint64)[0, 0]


def test_a_device_error_reaches_the_requests_of_its_step_and_the_next_ones_go_on(ahead):
    harness = Harness()
    harness.submit("a", alone.prompt_of(5), max_tokens=6)
    harness.step()
    harness.model.fail_next = 1
    harness.submit("b", alone.prompt_of(2 * PAGE_TOKENS), max_tokens=6)
    harness.run()
    assert "on fire" in harness.failures["a"].message
    harness.submit("c", alone.prompt_of(7), max_tokens=6)
    harness.run()
    assert harness.tokens["c"] == greedy(alone.prompt_of(7), 6)
    harness.assert_empty()


def test_a_captured_step_serves_every_batch_that_fits_and_no_prompt(monkeypatch):
    harness = Harness(max_num_seqs=4, cudagraph_capture_sizes=(2,))
    graphs = harness.engine._graphs
    replayed = []
    real = graphs.replay
    monkeypatch.setattr(graphs, "replay", lambda shape: replayed.append(shape.num_requests) or real(shape))
    for index in range(3):
        harness.submit(f"r{index}", alone.prompt_of(5 + index, seed=index), max_tokens=4 + 3 * index)
    harness.run()
    for index in range(3):
        assert harness.tokens[f"r{index}"] == greedy(alone.prompt_of(5 + index, seed=index), 4 + 3 * index)
    assert set(replayed) == {2}
    assert len(replayed) == 6, "steps with two requests, then with one; those with three were not captured"
