import pytest

from api.chat import render_chat, render_fim
from api.chat_checkpoint import encode_messages
from api.encoding.effort import EffortProfile
from api.encoding.segments import prompt_text
from runtime.errors import RequestError
from tests.api.text import vectors

CORE = [
    (name, vector)
    for name in ("encode-core.json", "encode-golden-official.json")
    for vector in vectors.load(name)["vectors"]
]
REQUESTS = vectors.load("encode-requests.json")["vectors"]


def core_prompt(vector, profile=EffortProfile.PREVIEW, **changes):
    arguments = {**vector["input"], **changes}
    return prompt_text(encode_messages(arguments.pop("messages"), profile=profile, **arguments))


@pytest.mark.parametrize(("name", "vector"), CORE, ids=lambda value: value["name"] if isinstance(value, dict) else "")
def test_the_checkpoints_encoder_is_matched(name, vector):
    expected = vectors.decided(name, vector)
    if "error" in expected:
        with pytest.raises(RequestError):
            core_prompt(vector)
    else:
        assert core_prompt(vector) == expected["prompt"]


@pytest.mark.parametrize("vector", [v for _, v in CORE if "ga0731" in v], ids=lambda vector: vector["name"])
def test_the_0731_profile_differs_only_in_the_effort_text(vector):
    given = vector["ga0731"].get("at_given_effort")
    if given is not None:
        if "error" in given:
            with pytest.raises(RequestError):
                core_prompt(vector, EffortProfile.GA_0731)
        else:
            assert core_prompt(vector, EffortProfile.GA_0731) == given["prompt"]
    texts = vectors.load("encode-core.json")["texts"]
    by_effort = vector["ga0731"]["low_high_max"]
    if isinstance(by_effort, str):
        if "error" in vectors.decided("encode-core.json", vector) or vector["input"]["reasoning_effort"] == "max":
            return
        bos = "<｜begin▁of▁sentence｜>"
        plain = core_prompt(vector)
        assert plain.startswith(bos)
        by_effort = {
            effort: {"prompt": bos + text + plain.removeprefix(bos)}
            for effort, text in (("low", ""), ("high", texts["ga0731_high"]), ("max", texts["ga0731_max"]))
        }
    for effort, expected in by_effort.items():
        assert core_prompt(vector, EffortProfile.GA_0731, reasoning_effort=effort) == expected["prompt"]


@pytest.mark.parametrize("profile", EffortProfile)
@pytest.mark.parametrize("vector", REQUESTS, ids=lambda vector: vector["name"])
def test_requests_become_the_recommended_prompt(vector, profile):
    expected = vector["expected" if profile is EffortProfile.PREVIEW else "expected_ga0731"]
    if "error" in expected:
        with pytest.raises(RequestError) as caught:
            vectors.chat_request(vector["input"], profile)
        assert f"400 {caught.value.param}" in expected["error"]
        return
    rendered = render_chat(vectors.chat_request(vector["input"], profile))
    assert rendered.text == expected["prompt"]
    assert (rendered.mode.thinking, rendered.mode.effort) == (expected["thinking"], expected["effort"])


@pytest.mark.parametrize("vector", vectors.load("completions-fim.json")["vectors"], ids=lambda vector: vector["name"])
def test_a_suffix_makes_a_fill_in_the_middle_prompt(vector):
    assert prompt_text(render_fim(**vector["input"])) == vector["expected"]["prompt"]
