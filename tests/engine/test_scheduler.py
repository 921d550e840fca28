"""The scheduler as what it is: a function from a snapshot to a plan."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler import Limits, Prefilling, Snapshot, Victim, Waiting, plan_step

LIMITS = Limits(
    max_num_seqs=8,
    max_num_batched_tokens=100,
    min_prompt_tokens=10,
    max_held_requests=2,
    long_prefill_share=0.5,
    reserved_pages=1,
)


def snapshot(**changes):
    empty = {
        "num_decoding": 0,
        "num_growing": 0,
        "num_receiving": 0,
        "num_sends": 0,
        "prefilling": (),
        "waiting": (),
        "victims": (),
        "free_pages": 100,
        "free_slots": 100,
    }
    return Snapshot(**{**empty, **changes})


def waiting(name, num_tokens=10, *, num_pages=1, sends=False, receives=False):
    return Waiting(name, num_tokens, num_pages, sends, receives, num_tokens)


def prefilling(name, num_tokens, max_chunk=10**6, num_computed=0):
    return Prefilling(name, num_computed, num_tokens, max_chunk)


def test_nothing_to_do_is_an_empty_plan():
    plan = plan_step(snapshot(), LIMITS)
    assert (plan.preempt, plan.receive, plan.admit, plan.chunks) == ((), (), (), ())


def test_a_prompt_alone_gets_the_whole_budget():
    plan = plan_step(snapshot(prefilling=[prefilling("a", 1000)]), LIMITS)
    assert plan.chunks == (("a", 100),)


def test_decoding_comes_first_and_leaves_the_rest():
    plan = plan_step(snapshot(num_decoding=7, prefilling=[prefilling("a", 1000)]), LIMITS)
    assert plan.chunks == (("a", 93),)


def test_a_full_decode_batch_still_leaves_something_to_prompts():
    plan = plan_step(snapshot(num_decoding=100, prefilling=[prefilling("a", 1000)]), LIMITS)
    assert plan.chunks == (("a", 10),)


def test_the_oldest_prompt_is_sure_of_its_share_and_the_shortest_get_the_rest():
    prompts = [prefilling("old", 1000), prefilling("long", 900), prefilling("short", 20), prefilling("shorter", 5)]
    plan = plan_step(snapshot(prefilling=prompts), LIMITS)
    assert dict(plan.chunks) == {"old": 50, "long": 25, "short": 20, "shorter": 5}


def test_what_the_shortest_leave_goes_back_to_the_oldest():
    plan = plan_step(snapshot(prefilling=[prefilling("old", 200), prefilling("short", 20)]), LIMITS)
    assert dict(plan.chunks) == {"old": 80, "short": 20}


def test_a_bounded_chunk_is_respected():
    plan = plan_step(snapshot(prefilling=[prefilling("scored", 1000, max_chunk=16)]), LIMITS)
    assert plan.chunks == (("scored", 16),)


def test_admitted_prompts_are_computed_in_the_same_step():
    plan = plan_step(snapshot(waiting=[waiting("a", 30), waiting("b", 10)]), LIMITS)
    assert plan.admit == ("a", "b")
    assert dict(plan.chunks) == {"a": 30, "b": 10}


def test_nobody_overtakes_a_request_that_waits_for_pages():
    plan = plan_step(snapshot(waiting=[waiting("big", num_pages=101), waiting("small")]), LIMITS)
    assert plan.admit == ()


def test_admission_leaves_a_reserve_to_those_who_run():
    queue = [waiting("a", num_pages=100)]
    assert plan_step(snapshot(waiting=queue), LIMITS).admit == ("a",), "nobody runs: nothing to reserve"
    assert plan_step(snapshot(waiting=queue, num_decoding=1), LIMITS).admit == ()


def test_pages_that_running_requests_need_now_are_not_given_away():
    plan = plan_step(
        snapshot(waiting=[waiting("a", num_pages=8)], num_decoding=2, num_growing=2, free_pages=10), LIMITS
    )
    assert plan.admit == ()


def test_receives_and_prompts_share_the_bound_of_running_requests():
    queue = [waiting("r", receives=True), waiting("a"), waiting("s", receives=True)]
    plan = plan_step(snapshot(waiting=queue, num_decoding=4, num_receiving=2), LIMITS)
    assert (plan.receive, plan.admit) == (("r",), ("a",))


def test_sends_stop_at_the_bound_of_held_states():
    queue = [waiting("a", sends=True), waiting("b", sends=True)]
    assert plan_step(snapshot(waiting=queue, num_sends=1), LIMITS).admit == ("a",)


def test_the_youngest_are_preempted_until_the_others_can_grow():
    victims = [Victim("young", 1, False), Victim("middle", 2, True), Victim("old", 5, True)]
    plan = plan_step(
        snapshot(num_decoding=3, num_growing=2, free_pages=0, victims=victims, waiting=[waiting("w")]), LIMITS
    )
    assert plan.preempt == ("young", "middle")
    assert plan.admit == (), "what was freed is for those who grow"


def test_a_preempted_prompt_is_not_computed():
    prompts = [prefilling("old", 30), prefilling("young", 30)]
    victims = [Victim(prompts[1].request, 3, False), Victim("decoding", 2, True)]
    plan = plan_step(snapshot(num_decoding=1, num_growing=1, free_pages=0, victims=victims, prefilling=prompts), LIMITS)
    assert plan.preempt == ("young",)
    assert plan.chunks == (("old", 30),)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), max_size=12),
    st.integers(0, 120),
    st.integers(1, 200),
    st.floats(0.01, 1.0),
)
def test_the_budget_is_used_up_and_never_exceeded(sizes, num_decoding, budget, share):
    prompts = [prefilling(str(i), tokens, max_chunk) for i, (tokens, max_chunk) in enumerate(sizes)]
    limits = replace(LIMITS, max_num_batched_tokens=budget, min_prompt_tokens=min(10, budget), long_prefill_share=share)
    plan = plan_step(snapshot(prefilling=prompts, num_decoding=num_decoding), limits)
    available = max(budget - num_decoding, min(10, budget))
    wanted = sum(min(tokens, max_chunk) for tokens, max_chunk in sizes)
    assert sum(tokens for _, tokens in plan.chunks) == min(available, wanted)
    for name, tokens in plan.chunks:
        assert 1 <= tokens <= min(sizes[int(name)])
    if prompts:
        first = min(sizes[0])
        assert dict(plan.chunks)["0"] >= min(first, max(1, int(available * share)))


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8),
    st.integers(1, 200),
    st.sampled_from([4, 16, 128]),
)
def test_chunks_end_at_block_boundaries_unless_they_end_a_prompt_or_nothing_else_moves(sizes, budget, alignment):
    prompts = [prefilling(str(i), tokens, most, computed) for i, (computed, tokens, most) in enumerate(sizes)]
    limits = replace(
        LIMITS, max_num_batched_tokens=budget, min_prompt_tokens=min(10, budget), chunk_alignment=alignment
    )
    plan = plan_step(snapshot(prefilling=prompts), limits)
    assert sum(tokens for _, tokens in plan.chunks) <= max(budget, 1)
    assert plan.chunks[0][0] == "0", "the oldest always moves on"
    for name, tokens in plan.chunks:
        computed, left, _ = sizes[int(name)]
        assert tokens == left or (computed + tokens) % alignment == 0 or (name == "0" and tokens < alignment)


def test_whole_prompts_are_cut_at_block_boundaries():
    plan = plan_step(snapshot(prefilling=[prefilling("a", 1000)]), replace(LIMITS, chunk_alignment=16))
    assert plan.chunks == (("a", 96),)
