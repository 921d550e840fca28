"""kv_transfer_params on the two legs of a disaggregated request."""

from typing import Any

import pytest

from runtime.requests import ReceiveState, SendState

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TRANSFER = "0123456789abcdef" * 2
SEND = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": TRANSFER}
RECEIVE = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "transfer_id": TRANSFER,
    "remote_address": "10.0.0.1:4000",
    "remote_epoch": "f" * 32,
}


async def test_the_prefill_leg_computes_one_token_and_is_not_streamed(serve: Any) -> None:
    server = await serve(role="prefill")
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 50,
            "kv_transfer_params": SEND}  # fmt: skip
    answer = await server.post_json(CHAT, body)
    submit = server.engine.submitted[0]
    assert submit.handoff == SendState(transfer_id=TRANSFER)
    assert submit.sampling.max_tokens == 1
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["usage"]["prompt_tokens"] == len(submit.prompt_ids)


@pytest.mark.parametrize(
    ("fields", "params", "expected"),
    [
        ({"max_tokens": 1, "min_tokens": 1}, {}, 0),
        ({"max_tokens": 1, "min_tokens": 1, "max_completion_tokens": 1}, {}, 0),
        ({"max_tokens": 1, "min_tokens": 1}, {"min_tokens": 4}, 1),
        ({"max_tokens": 1, "min_tokens": 1}, {"min_tokens": 0}, 0),
        ({"max_tokens": 1}, {}, 0),
        ({"max_tokens": 1, "min_tokens": 9}, {}, 1),
        ({"max_tokens": 1, "min_tokens": 1}, {"min_tokens": -5}, 0),
    ],
)
async def test_the_routers_min_tokens_is_an_artefact(
    serve: Any, fields: dict[str, int], params: dict[str, int], expected: int
) -> None:
    server = await serve(role="prefill")
    await server.post_json(CHAT, {"messages": HI, **fields, "kv_transfer_params": {**SEND, **params}})
    assert server.engine.submitted[0].sampling.min_tokens == expected


async def test_the_decode_leg_names_where_the_state_is(serve: Any) -> None:
    server = await serve(role="decode")
    await server.post_json(COMPLETIONS, {"prompt": [5], "max_tokens": 3, "kv_transfer_params": RECEIVE})
    assert server.engine.submitted[0].handoff == ReceiveState(
        transfer_id=TRANSFER, source_address="10.0.0.1:4000", source_epoch="f" * 32
    )
    assert server.engine.submitted[0].sampling.max_tokens == 3


@pytest.mark.parametrize(("role", "params"), [("prefill", SEND), ("decode", RECEIVE)])
async def test_each_choice_is_a_transfer_of_its_own_under_the_same_name_on_both_legs(
    serve: Any, role: str, params: dict[str, Any]
) -> None:
    server = await serve(role=role)
    body = {"prompt": [[5], [6]], "n": 2, "max_tokens": 1, "seed": 1, "kv_transfer_params": params}
    await server.post_json(COMPLETIONS, body)
    ids = [submit.handoff.transfer_id for submit in server.engine.submitted]
    assert ids == [f"{TRANSFER}-{number}" for number in range(4)]


async def test_a_decode_node_without_parameters_computes_by_itself(serve: Any) -> None:
    server = await serve(role="decode")
    for params in (None, {}, {"do_remote_prefill": False, "do_remote_decode": False, "remote_engine_id": None}):
        await server.post_json(CHAT, {"messages": HI, "max_tokens": 1, "kv_transfer_params": params})
    assert [submit.handoff for submit in server.engine.submitted] == [None] * 3


@pytest.mark.parametrize("key", ["transfer_id", "remote_address"])
async def test_half_a_set_is_refused_by_the_missing_key(serve: Any, key: str) -> None:
    server = await serve(role="decode")
    params = {name: value for name, value in RECEIVE.items() if name != key}
    answer = await server.post_json(COMPLETIONS, {"prompt": "a", "kv_transfer_params": params}, status=400)
    assert answer["error"]["param"] == "kv_transfer_params"
    assert key in answer["error"]["message"]


@pytest.mark.parametrize(
    ("role", "params", "code"),
    [
        ("prefill", None, "prefill_only"),
        ("prefill", RECEIVE, "prefill_only"),
        ("decode", SEND, "not_a_prefill_node"),
        ("standalone", SEND, "not_a_prefill_node"),
        ("standalone", RECEIVE, "not_a_decode_node"),
    ],
)
async def test_a_leg_for_another_role_is_refused(serve: Any, role: str, params: Any, code: str) -> None:
    server = await serve(role=role)
    answer = await server.post_json(CHAT, {"messages": HI, "kv_transfer_params": params}, status=400)
    assert answer["error"]["code"] == code
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("transfer_id", "a b"), ("transfer_id", ""), ("transfer_id", "x" * 200), ("remote_address", "nowhere"),
     ("remote_epoch", "zz"), ("remote_address", "http://a:1/")],
)  # fmt: skip
async def test_values_that_cannot_be_meant_are_refused(serve: Any, key: str, value: str) -> None:
    server = await serve(role="decode")
    body = {"prompt": "a", "kv_transfer_params": {**RECEIVE, key: value}}
    answer = await server.post_json(COMPLETIONS, body, status=400)
    assert key in answer["error"]["message"]


async def test_the_decode_leg_can_take_the_prompt_as_ids(serve: Any) -> None:
    server = await serve(role="decode")
    params = {**RECEIVE, "prompt_token_ids": [5, 6, 7]}
    await server.post_json(CHAT, {"messages": HI, "max_tokens": 1, "kv_transfer_params": params})
    assert server.engine.submitted[0].prompt_ids == (5, 6, 7)
    for wrong in ([], [10**6]):
        params = {**RECEIVE, "prompt_token_ids": wrong}
        await server.post_json(CHAT, {"messages": HI, "kv_transfer_params": params}, status=400)


async def test_the_rank_header_picks_the_engine(serve: Any) -> None:
    server = await serve(num_ranks=3)
    for value in ("0", "2", "", "two", "1.5"):
        await server.post_json(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, headers={"x-data-parallel-rank": value})
    assert server.engine.ranks_used == [0, 2, None, None, None]
    for value in ("3", "-1"):
        answer = await server.post_json(
            COMPLETIONS, {"prompt": "a"}, status=400, headers={"x-data-parallel-rank": value}
        )
        assert answer["error"]["param"] == "x-data-parallel-rank"
