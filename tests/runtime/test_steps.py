"""Steps that came together are one step, in which nothing is lost and nothing changes its order."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from runtime.requests import Drained, FromEngine, RequestFailed, StepOutput, TokenLogprobs, Tokens
from runtime.steps import joined


def step(*outputs: Tokens) -> StepOutput:
    return StepOutput(outputs)


def test_steps_between_other_messages_are_joined_and_stay_in_their_place() -> None:
    failed = RequestFailed(request_id="b", kind="internal", message="m")
    first, second = Tokens("a", (1,), prompt_tokens=9, cached_tokens=4), Tokens("a", (2, 3))
    end = Tokens("a", (4,), finish_reason="stop", stop_token_id=4)
    messages: list[FromEngine] = [step(first, Tokens("b", (7,))), step(second), failed, step(end), Drained(0)]
    assert list(joined(messages)) == [
        step(Tokens("a", (1, 2, 3), prompt_tokens=9, cached_tokens=4), Tokens("b", (7,))),
        failed,
        step(end),
        Drained(0),
    ]


def test_what_belongs_to_the_first_and_to_the_last_token_is_kept() -> None:
    logprobs = [TokenLogprobs(number, -1.0, 1, (), ()) for number in range(3)]
    first = Tokens("a", (0,), (logprobs[0],), prompt_tokens=2, prompt_logprobs=(None, logprobs[1]))
    last = Tokens("a", (2,), (logprobs[2],), finish_reason="stop", stop_token_id=2, prompt_tokens=2, cached_tokens=1)
    assert list(joined([step(first), step(last)])) == [
        step(
            Tokens(
                "a", (0, 2), (logprobs[0], logprobs[2]), finish_reason="stop", stop_token_id=2,
                prompt_tokens=2, cached_tokens=1, prompt_logprobs=(None, logprobs[1]),
            )
        )
    ]  # fmt: skip


def test_a_step_that_came_alone_is_passed_on_as_it_is() -> None:
    alone = step(Tokens("a", (1,)))
    (passed,) = joined([alone])
    assert passed is alone
    assert list(joined([])) == []


names = st.sampled_from("abc")
steps = st.builds(
    lambda outputs: StepOutput(tuple(Tokens(name, tuple(ids)) for name, ids in outputs.items())),
    st.dictionaries(names, st.lists(st.integers(0, 99), min_size=1, max_size=3)),
)


@given(messages=st.lists(st.one_of(steps, st.builds(Drained, st.integers(0, 3))), max_size=12))
def test_every_request_gets_its_tokens_in_order_and_at_most_once_in_a_step(messages: list[FromEngine]) -> None:
    def ids(all_messages: list[FromEngine]) -> dict[str, list[int]]:
        got: dict[str, list[int]] = {name: [] for name in "abc"}
        for message in all_messages:
            for tokens in message.outputs if isinstance(message, StepOutput) else ():
                got[tokens.request_id] += tokens.token_ids
        return got

    passed = list(joined(messages))
    assert ids(passed) == ids(messages)
    assert [m for m in passed if isinstance(m, Drained)] == [m for m in messages if isinstance(m, Drained)]
    kinds = [type(message) for message in passed]
    assert (StepOutput, StepOutput) not in list(itertools.pairwise(kinds))
    for message in passed:
        if isinstance(message, StepOutput) and len(messages) > 1:
            requests = [tokens.request_id for tokens in message.outputs]
            assert len(requests) == len(set(requests))
