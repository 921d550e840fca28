"""/v1/completions over a real socket."""

import math
from typing import Any

import pytest

from tests.api.http.conftest import Server
from tests.api.http.events import chunks_of

PATH = "/v1/completions"


def text_of(answer: dict[str, Any], choice: int = 0) -> str:
    text: str = answer["choices"][choice]["text"]
    return text


async def test_a_text_prompt_is_completed(server: Server) -> None:
    answer = await server.post_json(PATH, {"model": "tiny", "prompt": "Hello", "max_tokens": 5})
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    assert len(text_of(answer)) == 5
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (1, 5, 6)


async def test_max_tokens_is_sixteen_when_none_is_named(server: Server) -> None:
    answer = await server.post_json(PATH, {"prompt": "Hello"})
    assert answer["usage"]["completion_tokens"] == 16


async def test_token_ids_reach_the_engine_as_they_are(server: Server) -> None:
    await server.post_json(PATH, {"prompt": [5, 6, 7], "max_tokens": 1})
    assert server.engine.submitted[0].prompt_ids == (5, 6, 7)


async def test_several_prompts_with_n_are_numbered_prompt_by_prompt(server: Server) -> None:
    body = {"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 4, "seed": 3}
    answer = await server.post_json(PATH, body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [submit.prompt_ids for submit in server.engine.submitted] == [(5, 6), (5, 6), (7,), (7,)]
    assert [submit.sampling.seed for submit in server.engine.submitted] == [3, 4, 3, 4]
    assert len({submit.request_id for submit in server.engine.submitted}) == 4
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 3
    assert usage["completion_tokens"] == 16


async def test_control_tokens_in_a_raw_prompt_are_tokens(server: Server) -> None:
    await server.post_json(PATH, {"prompt": "<｜begin▁of▁sentence｜>Hello", "max_tokens": 1})
    tokenizer = server.engine.tokenizer
    assert server.engine.submitted[0].prompt_ids == (tokenizer.bos_id, *tokenizer.encode("Hello"))


async def test_a_suffix_asks_to_fill_in_the_middle(server: Server) -> None:
    await server.post_json(PATH, {"prompt": "a", "suffix": "b", "max_tokens": 1})
    rendered = server.engine.tokenizer.decode(server.engine.submitted[0].prompt_ids)
    assert rendered == "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"


async def test_a_stream_says_the_same_as_a_whole_answer(server: Server) -> None:
    body = {"prompt": "Hello", "max_tokens": 9, "temperature": 0}
    whole = await server.post_json(PATH, body)
    response = await server.post(PATH, {**body, "stream": True, "stream_options": {"include_usage": True}})
    chunks = await chunks_of(response)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == text_of(whole)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks[:-1])


async def test_usage_can_come_with_every_chunk(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await server.post(PATH, {"prompt": "a", "max_tokens": 3, "stream": True, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in await chunks_of(response)]
    assert counts == [1, 2, 3, 3]


async def test_choices_of_a_stream_interleave_by_index(server: Server) -> None:
    response = await server.post(PATH, {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "seed": 1, "stream": True})
    texts = dict.fromkeys(range(4), "")
    finished = set()
    for chunk in await chunks_of(response):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                finished.add(choice["index"])
    assert finished == {0, 1, 2, 3}
    assert all(len(text) == 3 for text in texts.values())


async def test_echo_repeats_the_prompt(server: Server) -> None:
    answer = await server.post_json(PATH, {"prompt": "Hello", "echo": True, "max_tokens": 2})
    assert text_of(answer).startswith("Hello")
    assert answer["usage"]["completion_tokens"] == 2


async def test_echo_of_no_tokens_scores_the_prompt(server: Server) -> None:
    answer = await server.post_json(PATH, {"prompt": "the in", "echo": True, "max_tokens": 0, "logprobs": 1})
    choice = answer["choices"][0]
    assert choice["text"] == "the in"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == "the in"
    assert logprobs["token_logprobs"][0] is None
    assert all(value == pytest.approx(math.log(0.5)) for value in logprobs["token_logprobs"][1:])
    assert choice["prompt_logprobs"][0] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_the_legacy_shape(server: Server, stream: bool) -> None:
    body = {"prompt": "Hello", "echo": True, "logprobs": 2, "max_tokens": 3, "stream": stream}
    response = await server.post(PATH, body)
    if stream:
        parts = [chunk["choices"][0] for chunk in await chunks_of(response)]
    else:
        parts = (await response.json())["choices"]
    logprobs: dict[str, list[Any]] = {
        key: [item for part in parts for item in part["logprobs"][key]] for key in parts[0]["logprobs"]
    }
    text = "".join(part["text"] for part in parts)
    assert logprobs["tokens"][0] == "Hello"
    assert "".join(logprobs["tokens"]) == text
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset : offset + len(token)] == token
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])


async def test_tokens_can_be_named_by_their_ids(server: Server) -> None:
    body = {"prompt": "a", "logprobs": 0, "max_tokens": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = (await server.post_json(PATH, body))["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{choice['token_ids'][0]}"]
    assert choice["prompt_token_ids"] == server.engine.tokenizer.encode("a")


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_choice_and_the_engines_work(serve: Any, include: bool) -> None:
    server = await serve(step_s=0.001)
    server.engine.script("one two three four five six seven")
    body = {"prompt": "a", "max_tokens": 100, "stop": ["zzz", "wo t"], "include_stop_str_in_output": include}
    answer = await server.post_json(PATH, body)
    choice = answer["choices"][0]
    assert choice["text"] == ("one two t" if include else "one t")
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "wo t"
    assert answer["usage"]["completion_tokens"] == len(server.engine.tokenizer.encode("one two t"))
    assert server.engine.aborted == [server.engine.submitted[0].request_id]
    assert server.engine.num_running == 0


async def test_stop_strings_wait_for_min_tokens(server: Server) -> None:
    server.engine.script("xaxbx")
    answer = await server.post_json(PATH, {"prompt": "a", "max_tokens": 9, "min_tokens": 2, "stop": "x"})
    assert text_of(answer) == "xa"


async def test_a_stop_token_is_named_and_not_shown(server: Server) -> None:
    server.engine.script("abc")
    stop_id = server.engine.tokenizer.encode("b")[0]
    answer = await server.post_json(PATH, {"prompt": "a", "max_tokens": 9, "stop_token_ids": [stop_id]})
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", stop_id)
    assert answer["usage"]["completion_tokens"] == 2


async def test_eos_is_counted_and_not_shown(server: Server) -> None:
    server.engine.script("ab")
    answer = await server.post_json(PATH, {"prompt": "a", "max_tokens": 9, "skip_special_tokens": False})
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", None)
    assert answer["usage"]["completion_tokens"] == 3


async def test_a_character_is_never_cut(server: Server) -> None:
    server.engine.script("né 你好 🙂!")
    response = await server.post(PATH, {"prompt": "a", "max_tokens": 99, "stream": True})
    texts = [chunk["choices"][0]["text"] for chunk in await chunks_of(response)]
    assert "".join(texts) == "né 你好 🙂!"
    assert not any("\ufffd" in text for text in texts)


async def test_sampling_fields_arrive_resolved(server: Server) -> None:
    tokenizer = server.engine.tokenizer
    body = {
        "prompt": "a",
        "max_tokens": 3,
        "min_tokens": 2,
        "temperature": "0.5",
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "seed": 2**62 + 5,
        "logit_bias": {"5": 200, "6": -3},
        "allowed_token_ids": [5, 6, 7],
        "bad_words": ["the"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "priority": -7,
    }
    await server.post_json(PATH, body)
    submit = server.engine.submitted[0]
    sampling = submit.sampling
    assert submit.priority == -7
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (3, 2, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.5)
    assert sampling.seed == 2**62 + 5
    assert sampling.logit_bias == ((5, 100.0), (6, -3.0))
    assert sampling.allowed_token_ids == (5, 6, 7)
    assert sampling.bad_words[0] == tuple(tokenizer.encode("the"))
    assert sampling.stop_token_ids == (9,)
    assert sampling.ignore_eos
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, 2)


async def test_seeds_differ_when_none_is_given(server: Server) -> None:
    for _ in range(3):
        await server.post_json(PATH, {"prompt": "a", "max_tokens": 1})
    seeds = {submit.sampling.seed for submit in server.engine.submitted}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_a_prompt_can_be_truncated_from_the_left(server: Server) -> None:
    await server.post_json(PATH, {"prompt": [5, 6, 7, 8], "truncate_prompt_tokens": 2, "max_tokens": 1})
    assert server.engine.submitted[0].prompt_ids == (7, 8)


async def test_a_prompt_can_be_truncated_to_what_the_context_holds(serve: Any) -> None:
    server = await serve(max_model_len=10)
    for max_tokens in (1, 5):
        body = {"prompt": [5] * 50, "truncate_prompt_tokens": -1, "max_tokens": max_tokens}
        await server.post_json(PATH, body)
    assert [len(submit.prompt_ids) for submit in server.engine.submitted] == [9, 9]


async def test_what_is_asked_for_beyond_the_context_is_cut_to_what_is_left(serve: Any) -> None:
    server = await serve(max_model_len=20)
    answer = await server.post_json(PATH, {"prompt": [5] * 15, "max_tokens": 20})
    assert answer["usage"]["completion_tokens"] == 5


async def test_cached_tokens_are_reported(server: Server) -> None:
    server.engine.cached_tokens = 2
    usage = (await server.post_json(PATH, {"prompt": [5, 6, 7], "max_tokens": 1}))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert (usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]) == (2, 1)
