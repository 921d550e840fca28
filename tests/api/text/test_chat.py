import json

import pytest

from api.chat import ChatRequest, NamedTool, Tool, check_tools, render_chat
from api.chat_messages import check_tool_results, parse_message, parse_messages
from api.chat_mode import Mode, resolve_mode
from api.encoding import markers
from api.encoding.effort import ABSOLUTE_MAXIMUM, BEYOND_MAXIMUM, EFFORT_NAMES, EffortProfile, detect_profile
from api.encoding.messages import AssistantMessage, SystemMessage, ToolCall, ToolMessage, UserMessage
from api.parse_events import ParserStart, StartState
from runtime.errors import RequestError

PREVIEW, GA = EffortProfile.PREVIEW, EffortProfile.GA_0731
THINKING, PLAIN = Mode(thinking=True, effort="high"), Mode(thinking=False)
USER = {"role": "user", "content": "Q"}
PING = Tool(name="ping")
BOS, EOS = markers.BOS, markers.EOS


def mode(profile=PREVIEW, default=True, **said):
    return resolve_mode(profile=profile, default_thinking=default, **said)


def render(*messages, mode=PLAIN, **rest):
    return render_chat(ChatRequest(messages=parse_messages(messages), mode=mode, **rest))


def call(call_id, name="f", arguments="{}"):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": call_id} if call_id else {})


@pytest.mark.parametrize(
    ("name", "preview", "ga"),
    [
        ("minimal", ("high", ""), ("low", "")),
        ("low", ("high", ""), ("low", "")),
        ("medium", ("high", ""), ("high", ABSOLUTE_MAXIMUM)),
        ("high", ("high", ""), ("high", ABSOLUTE_MAXIMUM)),
        ("xhigh", ("max", ABSOLUTE_MAXIMUM), ("high", ABSOLUTE_MAXIMUM)),
        ("max", ("max", ABSOLUTE_MAXIMUM), ("max", BEYOND_MAXIMUM)),
        (None, ("high", ""), ("high", ABSOLUTE_MAXIMUM)),
    ],
)
def test_each_effort_maps_to_what_the_checkpoint_knows(name, preview, ga):
    for profile, (effort, text) in ((PREVIEW, preview), (GA, ga)):
        for said in ({"reasoning_effort": name}, {"template_kwargs": {"reasoning_effort": name}}):
            assert mode(profile, **said) == Mode(thinking=True, effort=effort, effort_text=text)
    assert mode(reasoning_effort=name).is_think_max == (preview[0] == "max")


@pytest.mark.parametrize(
    ("said", "thinks"),
    [
        ({}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "none", "template_kwargs": {"thinking": True}}, False),
        ({"reasoning_effort": "high", "template_kwargs": {"thinking": False}}, False),
        ({"reasoning_effort": "high", "thinking": "disabled"}, False),
        ({"template_kwargs": {"enable_thinking": False}}, False),
        ({"template_kwargs": {"thinking": False, "enable_thinking": True}}, True),
        ({"template_kwargs": {"thinking": True}, "thinking": "disabled"}, True),
        ({"thinking": "adaptive"}, True),
        ({"reasoning_effort": "low", "template_kwargs": {"reasoning_effort": "none"}}, True),
        ({"template_kwargs": {"thinking": None, "reasoning_effort": None}}, True),
    ],
)
def test_whether_a_request_thinks(said, thinks):
    assert mode(**said).thinking is thinks


def test_the_servers_default_counts_only_when_nothing_is_said():
    assert not mode(default=False).thinking
    assert mode(default=False, reasoning_effort="low").thinking
    assert mode(default=False, thinking="enabled").thinking


@pytest.mark.parametrize("value", ["turbo", "", "HIGH", "ultra", 3, True, ["high"]])
def test_unknown_efforts_are_refused_by_name(value):
    for said in ({"reasoning_effort": value}, {"template_kwargs": {"reasoning_effort": value}}):
        with pytest.raises(RequestError, match=", ".join(EFFORT_NAMES)) as caught:
            mode(**said)
        assert caught.value.param == "reasoning_effort"


def test_a_switch_that_is_no_boolean_is_refused():
    with pytest.raises(RequestError) as caught:
        mode(template_kwargs={"thinking": "yes"})
    assert caught.value.param == "chat_template_kwargs"


def test_the_profile_is_read_off_the_checkpoints_encoder(tmp_path):
    assert detect_profile(tmp_path) is PREVIEW
    encoder = tmp_path / "encoding" / "encoding_dsv4.py"
    encoder.parent.mkdir()
    encoder.write_text('REASONING_EFFORT_MAX = """Reasoning Effort: ..."""\n', encoding="utf-8")
    assert detect_profile(tmp_path) is PREVIEW
    encoder.write_text("REASONING_EFFORT_PROMPTS = {}\n", encoding="utf-8")
    assert detect_profile(tmp_path) is GA
    encoder.write_text("something else", encoding="utf-8")
    with pytest.raises(ValueError, match="encoding_dsv4"):
        detect_profile(tmp_path)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hello", "messages"),
        ([None], "messages.0"),
        ([USER, {"role": "critic", "content": "x"}], "messages.1.role"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": ["user"], "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": {"type": "text"}}], "messages.0.content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.0.type",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": [7]}], "messages.0.content.0"),
        ([{"role": "user", "content": "x", "task": "nonsense"}], "messages.0.task"),
        ([USER, {"role": "assistant", "content": "a", "tool_calls": "f"}], "messages.1.tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages.1.tool_calls.0.function"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "messages.1.tool_calls.0.function.name"),
        (
            [USER, {"role": "assistant", "tool_calls": [call("a", arguments=3)]}],
            "messages.1.tool_calls.0.function.arguments",
        ),
        ([USER, {"role": "assistant", "content": "a", "prefix": "yes"}], "messages.1.prefix"),
        ([{"role": "assistant", "content": "a", "prefix": True}, USER], "messages.0.prefix"),
        ([USER, {"role": "assistant", "content": "a", "reasoning_content": 3}], "messages.1.reasoning_content"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": 3}], "messages.1.tool_call_id"),
    ],
)
def test_malformed_messages_are_refused_with_their_place(values, param):
    with pytest.raises(RequestError) as caught:
        parse_messages(values)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_errors_do_not_repeat_what_the_caller_sent():
    secret = "s" * 50_000
    for value in ({"role": secret, "content": ""}, {"role": "user", "content": [{"type": secret}]}):
        with pytest.raises(RequestError) as caught:
            parse_messages([value])
        assert len(str(caught.value)) < 200


def test_content_parts_are_joined_by_a_blank_line():
    parts = [
        "a",
        {"type": "text", "text": "b"},
        {"type": "input_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    assert parse_message({"role": "user", "content": parts}, "m") == UserMessage(content="a\n\nb\n\nc\n\nd")
    assert parse_message({"role": "assistant", "content": None}, "m") == AssistantMessage()
    assert parse_message({"role": "developer", "content": "d"}, "m") == SystemMessage(content="d")


def test_both_names_of_the_reasoning_are_read():
    for said in ({"reasoning": "r"}, {"reasoning_content": "r"}, {"reasoning_content": "r", "reasoning": "other"}):
        assert parse_message({"role": "assistant", "content": "a", **said}, "m").reasoning == "r"


@pytest.mark.parametrize(
    "conversation",
    [
        [USER, {"role": "tool", "content": "x", "tool_call_id": "a"}],
        [USER, {"role": "assistant", "tool_calls": [call("a")]}],
        [USER, {"role": "assistant", "tool_calls": [call("a")]}, USER],
        [USER, {"role": "assistant", "tool_calls": [call("a")]}, {"role": "assistant", "content": "b"}],
        [USER, {"role": "assistant", "tool_calls": [call("a")]}, {"role": "tool", "content": "x", "tool_call_id": "b"}],
        [
            USER,
            {"role": "assistant", "tool_calls": [call("a"), call("b")]},
            {"role": "tool", "content": "", "tool_call_id": "b"},
        ],
        [
            USER,
            {"role": "assistant", "tool_calls": [call("a"), call("a")]},
            *[{"role": "tool", "content": "", "tool_call_id": "a"}] * 2,
        ],
        [
            USER,
            {"role": "assistant", "tool_calls": [call("a")]},
            *[{"role": "tool", "content": "", "tool_call_id": "a"}] * 2,
        ],
    ],
)
def test_calls_and_results_must_belong_together(conversation):
    with pytest.raises(RequestError) as caught:
        check_tool_results(parse_messages(conversation))
    assert caught.value.param.startswith("messages.")


def test_results_without_ids_answer_in_order():
    calls = [ToolCall(name="f", arguments="{}"), ToolCall(name="g", arguments="{}", id="b")]
    assistant = AssistantMessage(tool_calls=tuple(calls))
    for ids in ((None, None), (None, "b"), ("b", None), ("b", "x")):
        check_tool_results([assistant, *(ToolMessage(content="", tool_call_id=call_id) for call_id in ids)])


def test_arguments_may_be_an_object():
    arguments = {"city": "Oslo", "days": 2, "x": {"y": [1, "é"]}}
    for given in (arguments, json.dumps(arguments)):
        history = {"role": "assistant", "content": "", "tool_calls": [call("a", arguments=given)]}
        prompt = render(USER, history, {"role": "tool", "content": "r", "tool_call_id": "a"}).text
        assert '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n' in prompt
        assert '<｜DSML｜parameter name="x" string="false">{"y": [1, "é"]}</｜DSML｜parameter>\n' in prompt


@pytest.mark.parametrize(
    "arguments", ["", "[1, 2]", '"s"', "null", "NaN", '{"a": NaN}', '{"a": ', "[" * 100_000, "1" * 5000]
)
def test_history_arguments_that_are_no_object_are_kept_as_text(arguments):
    history = {"role": "assistant", "content": "", "tool_calls": [call("a", arguments=arguments)]}
    prompt = render(USER, history, {"role": "tool", "content": "r", "tool_call_id": "a"}).text
    assert f'name="arguments" string="true">{arguments}</｜DSML｜parameter>' in prompt


def test_system_texts_are_joined_at_the_front_with_tools_and_format():
    system = {"role": "system", "content": "S1"}
    rendered = render(
        USER,
        system,
        {"role": "system", "content": ""},
        {"role": "developer", "content": "S2"},
        tools=(PING,),
        format_text="F",
    )
    assert rendered.text.startswith(f"{BOS}S1\n\nS2\n\n## Tools\n\n")
    assert '{"name": "ping", "description": "", "parameters": {}}' in rendered.text
    assert rendered.text.endswith("to invoke tool calls.\n\n\nF<｜User｜>Q<｜Assistant｜></think>")


def test_every_assistant_turn_opens_itself_and_the_prompt_ends_with_an_open_one():
    greeting = {"role": "assistant", "content": "Hello", "reasoning_content": "R"}
    reminder = {"role": "latest_reminder", "content": "now"}
    opened = "<｜Assistant｜></think>"
    assert render(greeting, USER).text == f"{BOS}{opened}Hello{EOS}<｜User｜>Q{opened}"
    assert render({"role": "system", "content": "S"}).text == f"{BOS}S{opened}"
    assert render(USER, reminder).text == f"{BOS}<｜User｜>Q<｜latest_reminder｜>now{opened}"
    assert render(USER, greeting, mode=THINKING).text == f"{BOS}<｜User｜>Q{opened}Hello{EOS}<｜Assistant｜><think>"
    kept = render(USER, greeting, mode=THINKING, drop_reasoning=False).text
    assert kept == f"{BOS}<｜User｜>Q<｜Assistant｜><think>R</think>Hello{EOS}<｜Assistant｜><think>"
    assert render(USER, generation=False).text == f"{BOS}<｜User｜>Q"


@pytest.mark.parametrize(
    ("message", "mode", "end", "start"),
    [
        ({"content": "A"}, PLAIN, "</think>A", ParserStart(StartState.CONTENT, True)),
        ({"content": "A"}, THINKING, "<think></think>A", ParserStart(StartState.CONTENT, True)),
        ({"content": "A", "reasoning": "R"}, THINKING, "<think>R</think>A", ParserStart(StartState.CONTENT, True)),
        ({"content": "A", "reasoning": "R"}, PLAIN, "</think>A", ParserStart(StartState.CONTENT, True)),
        ({"content": "", "reasoning": "R"}, THINKING, "<think>R", ParserStart(StartState.REASONING, True)),
        ({"content": ""}, THINKING, "<think>", ParserStart(StartState.REASONING)),
        ({"content": ""}, PLAIN, "</think>", ParserStart(StartState.CONTENT)),
    ],
)
def test_a_last_turn_can_be_continued(message, mode, end, start):
    flagged = render(USER, {"role": "assistant", "prefix": True, **message}, mode=mode)
    asked = render(USER, {"role": "assistant", **message}, mode=mode, continue_final=True)
    assert flagged == asked
    assert flagged.text == f"{BOS}<｜User｜>Q<｜Assistant｜>{end}"
    assert flagged.start == start


def test_only_the_assistant_can_be_continued():
    with pytest.raises(RequestError) as caught:
        render(USER, continue_final=True)
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize("choice", ["required", NamedTool("ping")])
def test_a_forced_call_is_opened_in_the_prompt_only_without_thinking(choice):
    tools = (PING, Tool(name="pong"))
    plain = render(USER, tools=tools, tool_choice=choice)
    assert plain.text.endswith("<｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n")
    assert plain.start == ParserStart(StartState.TOOL)
    assert plain.must_call
    thinking = render(USER, tools=tools, tool_choice=choice, mode=THINKING)
    assert thinking.text.endswith("<｜Assistant｜><think>")
    assert thinking.must_call
    assert ("pong" in plain.text) == (choice == "required")


def test_without_a_choice_of_tools_none_are_shown_and_reasoning_is_dropped():
    turn = {"role": "assistant", "content": "A", "reasoning": "R"}
    hidden = render(USER, turn, USER, tools=(PING,), tool_choice="none", mode=THINKING)
    assert hidden.tools == ()
    assert "## Tools" not in hidden.text
    assert "R" not in hidden.text
    assert "<think>R</think>A" in render(USER, turn, USER, tools=(PING,), mode=THINKING).text


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ((Tool(name="a b"),), "auto", "tools.0.function.name"),
        ((Tool(name=""),), "auto", "tools.0.function.name"),
        ((Tool(name="x" * 300),), "auto", "tools.0.function.name"),
        ((PING, PING), "auto", "tools.1.function.name"),
        ((PING,), NamedTool("pong"), "tool_choice"),
        ((), "required", "tool_choice"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused(tools, choice, param):
    with pytest.raises(RequestError) as caught:
        check_tools(tools, choice)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("task", "mode", "end"),
    [
        ("action", PLAIN, "<｜Assistant｜></think><｜action｜>"),
        ("action", THINKING, "<｜Assistant｜><think><｜action｜>"),
        ("query", THINKING, "<｜query｜>"),
        ("domain", PLAIN, "<｜domain｜>"),
    ],
)
def test_a_task_asks_for_an_answer_without_reasoning(task, mode, end):
    rendered = render({"role": "user", "content": "a"}, {**USER, "task": task}, mode=mode)
    assert rendered.text == f"{BOS}<｜User｜>a\n\nQ{end}"
    assert rendered.start == ParserStart(StartState.CONTENT)


def test_a_title_is_asked_for_after_the_answer():
    rendered = render(USER, {"role": "assistant", "content": "A", "task": "title"})
    assert rendered.text == f"{BOS}<｜User｜>Q<｜Assistant｜></think>A{EOS}<｜title｜>"


def test_the_cost_of_rendering_grows_with_the_number_of_messages_only():
    results = [{"role": "tool", "content": "r", "tool_call_id": str(number)} for number in range(20_000)]
    assistant = {"role": "assistant", "tool_calls": [call(str(number)) for number in reversed(range(20_000))]}
    text = render(USER, assistant, *results).text
    assert text.count("<tool_result>") == 20_000


def test_schemas_too_deep_to_write_are_refused():
    deep = {}
    for _ in range(50_000):
        deep = {"properties": deep}
    with pytest.raises(RequestError, match="deep"):
        render(USER, tools=(Tool(name="ping", parameters=deep),))
