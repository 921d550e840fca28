"""Token ids in one buffer behave like a tuple, and are handled without looking at each."""

import time
from array import array

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.channel import ChannelAddress, EngineChannel, NodeChannel
from runtime.requests import SamplingParams, Submit
from runtime.token_ids import TokenIds

ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20)


@given(values=ids, start=st.integers(-25, 25), stop=st.integers(-25, 25))
def test_they_are_a_sequence_equal_to_any_other_of_the_same_integers(values, start, stop):
    token_ids = TokenIds(values)
    assert token_ids == values
    assert tuple(values) == token_ids
    assert token_ids == TokenIds(iter(values))
    assert list(token_ids) == values
    assert token_ids[start:stop] == values[start:stop]
    assert isinstance(token_ids[start:stop], TokenIds)
    assert (len(token_ids), bool(token_ids)) == (len(values), bool(values))
    assert hash(token_ids) == hash(tuple(values))
    assert TokenIds.from_bytes(token_ids.to_bytes()) == token_ids
    assert np.asarray(token_ids, dtype=np.int64).tolist() == values
    assert token_ids != [*values, 1]
    assert TokenIds.joined([array("i", values), 7, array("i", values)]) == [*values, 7, *values]


def test_what_is_no_token_id_is_refused():
    with pytest.raises(OverflowError):
        TokenIds([2**31])
    with pytest.raises(TypeError):
        TokenIds(["a"])
    with pytest.raises(ValueError):
        TokenIds.from_bytes(b"12345")
    assert TokenIds([1]) != "1"


async def test_a_prompt_crosses_the_channel_as_it_is_however_it_was_given(tmp_path):
    address = ChannelAddress(str(tmp_path), 0)
    engine = EngineChannel(address)
    channel = NodeChannel(address, lambda _: None)
    prompts = [TokenIds(range(1000)), tuple(range(1000)), TokenIds()]
    for number, prompt in enumerate(prompts):
        channel.send(Submit(request_id=str(number), prompt_ids=prompt, sampling=SamplingParams(max_tokens=1)))
    got = []
    while len(got) < len(prompts):
        got += engine.receive(10.0)
    assert [submit.prompt_ids for submit in got] == prompts
    assert all(type(submit.prompt_ids) is TokenIds for submit in got)
    channel.close()
    engine.close()


def test_half_a_million_ids_cost_a_small_part_of_what_they_would_as_objects():
    many = list(range(1000, 501_000))
    token_ids = TokenIds(many)

    def spent(work):
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            work()
            best = min(best, time.process_time() - begin)
        return best

    def sent():
        data = msgspec.msgpack.encode(token_ids.to_bytes())
        np.asarray(TokenIds.from_bytes(msgspec.msgpack.decode(data)[:]), dtype=np.int64)

    def sent_as_objects():
        np.asarray(msgspec.msgpack.decode(msgspec.msgpack.encode(many)), dtype=np.int64)

    assert spent(sent) < spent(sent_as_objects) / 5
