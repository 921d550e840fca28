import json
import random
import threading
import time

import jsonschema
import numpy as np
import pytest

from api.chat import ChatRequest, NamedTool, Tool, render_chat
from api.chat_mode import Mode
from api.encoding import markers
from api.encoding.messages import AssistantMessage, UserMessage
from api.grammar import Constraint, encode_constraint
from api.grammar_formats import (
    MAX_GRAMMAR_CHARS,
    choice_format,
    grammar_format,
    json_object_format,
    json_schema_format,
    regex_format,
)
from api.grammar_matcher import GrammarMatchers
from api.grammar_request import GrammarPlanner
from api.grammar_tags import structural_tag_format
from api.parse import OutputParser
from runtime.errors import Overloaded, RequestError
from tests.api.text.outputs import collect

THINKING, PLAIN = Mode(thinking=True, effort="high"), Mode(thinking=False)
ASK = (UserMessage(content="q"),)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["c", "f"]},
            "where": {"$ref": "#/$defs/Place"},
            "note": {"type": ["string", "null"]},
        },
        "required": ["city", "unit"],
        "$defs": {"Place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]}},
    },
)
PING = Tool(name="ping", parameters={"type": "object", "properties": {}})


@pytest.fixture(scope="module")
def planner(small):
    planner = GrammarPlanner(small)
    yield planner
    planner.close()


@pytest.fixture(scope="module")
def matchers(small_folder):
    matchers = GrammarMatchers(small_folder)
    yield matchers
    matchers.close()


def mask_of(matcher, tokenizer):
    row = np.full((tokenizer.vocab_size + 64) // 32, 0x5A5A5A5A, np.int32)
    matcher.fill_bitmask(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    assert not bits[tokenizer.vocab_size :].any()
    return set(np.flatnonzero(bits))


def follow(matcher, tokenizer, text):
    """Feed a text token by token; returns what came before the first token that was not allowed."""
    token_ids = tokenizer.encode(text)
    for position, token_id in enumerate(token_ids):
        if matcher.is_done or token_id not in mask_of(matcher, tokenizer):
            return tokenizer.decode(token_ids[:position])
        matcher.accept(token_id)
    return text


def can_end(matcher, tokenizer):
    return matcher.is_done or tokenizer.eos_id in mask_of(matcher, tokenizer)


def chat(mode=PLAIN, **changes):
    return render_chat(ChatRequest(messages=changes.pop("messages", ASK), mode=mode, **changes))


def block(*calls):
    invokes = "".join(f"<｜DSML｜invoke {call}</｜DSML｜invoke>\n" for call in calls)
    return f"\n\n<｜DSML｜tool_calls>\n{invokes}</｜DSML｜tool_calls>"


def string(key, value):
    return f'<｜DSML｜parameter name="{key}" string="true">{value}</｜DSML｜parameter>\n'


def other(key, value):
    return f'<｜DSML｜parameter name="{key}" string="false">{value}</｜DSML｜parameter>\n'


OSLO = f'name="get_weather">\n{string("city", "Oslo")}{string("unit", "c")}'


@pytest.mark.parametrize(
    ("answer", "good", "bad"),
    [
        (json_object_format(), '{"a": [1, {"b": null}]}', "[1]"),
        (json_schema_format(PERSON, "p"), '{"name": "Ann", "age": 3}', '{"name": 3}'),
        (json_schema_format(json.dumps(PERSON), "p"), '{\n  "name": "Zoë",\n  "age": 3\n}', '{"age": 3}'),
        (json_schema_format(True, "p"), "[1]", "x"),
        (regex_format(r"\d{3}/\d{2}", "p"), "123/45", "123-45"),
        (choice_format(["yes", "no", 'the "end"'], "p"), 'the "end"', "maybe"),
        (grammar_format('start: "a" NUMBER\nNUMBER: /[0-9]+/', "p"), "a12", "b"),
        (grammar_format('root ::= "a" [0-9]+ | tail\ntail ::= "the"', "p"), "the", "tho"),
    ],
)
async def test_answers_keep_to_their_format(planner, matchers, small, answer, good, bad):
    spec = await planner.for_text(answer, "response_format")
    matcher = matchers(spec)
    assert not can_end(matcher, small)
    assert follow(matcher, small, good) == good
    assert can_end(matcher, small)
    matcher = matchers(spec)
    assert follow(matcher, small, bad) != bad


async def test_a_finished_answer_is_done_and_an_open_one_ends_with_eos(planner, matchers, small):
    matcher = matchers(await planner.for_text(json_schema_format(PERSON, "p"), "p"))
    follow(matcher, small, '{"name": "Ann", "age": 3}')
    assert matcher.is_done
    matcher = matchers(await planner.for_text(regex_format("a+", "p"), "p"))
    follow(matcher, small, "aa")
    assert not matcher.is_done
    matcher.accept(small.eos_id)
    assert matcher.is_done


async def test_the_reasoning_is_free_but_cannot_be_the_end(planner, matchers, small):
    spec = await planner.for_chat(chat(THINKING), json_schema_format(PERSON, "p"), "p")
    matcher = matchers(spec)
    everything = set(range(small.vocab_size)) - {small.eos_id}
    assert mask_of(matcher, small) == everything
    text = "Let me {think} <｜DSML｜tool_calls> about it.\n</think>"
    assert follow(matcher, small, text) == text
    answer = '{"name": "Ann", "age": 3}'
    assert follow(matcher, small, "no") == ""
    assert follow(matcher, small, answer) == answer


async def test_control_tokens_never_match_text(planner, matchers, small):
    matcher = matchers(await planner.for_text(regex_format("(?s:.*)", "p"), "p"))
    allowed = mask_of(matcher, small)
    assert allowed & small.added_ids == {small.eos_id}
    assert len(allowed) > 150


@pytest.mark.parametrize("mode", [THINKING, PLAIN], ids=["thinking", "plain"])
async def test_a_required_call_is_one_of_the_tools_and_follows_its_schema(planner, matchers, small, mode):
    rendered = chat(mode, tools=(WEATHER, PING), tool_choice="required")
    spec = await planner.for_chat(rendered, None, "tools")
    before = "Hm.</think>" if mode is THINKING else ""

    def run(calls):
        text = before + calls
        if mode is PLAIN:
            text = text.removeprefix("\n\n<｜DSML｜tool_calls>\n")
        matcher = matchers(spec)
        return follow(matcher, small, text) == text and matcher.is_done

    place = other("where", '{"lat": 1.5}')
    assert run(block(OSLO))
    assert run(block(OSLO, 'name="ping">\n', 'name="ping">\n\n'))
    html = string("city", 'a</b> <i>\n"é') + other("days", 3) + string("unit", "f")
    assert run(block(f'name="get_weather">\n{html}'))
    assert run(block(OSLO + place + string("note", "n")))
    assert run(block(OSLO + other("note", "null")))
    assert not run("Oslo it is.")
    assert not run(block('name="get_weather">\n' + string("unit", "c")))
    assert not run(block(OSLO.replace(">c<", ">k<")))
    assert not run(block(OSLO + other("days", '"x"')))
    assert not run(block(OSLO + other("where", "{}")))
    assert not run(block('name="other">\n'))
    assert not run(block('name="ping">\n' + string("a", "b")))


async def test_a_named_tool_is_the_only_one_and_can_be_called_once(planner, matchers, small):
    rendered = chat(tools=(WEATHER, PING), tool_choice=NamedTool("ping"))
    spec = await planner.for_chat(rendered, None, "tools")
    matcher = matchers(spec)
    text = '<｜DSML｜invoke name="ping">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    assert follow(matcher, small, text) == text
    assert matcher.is_done
    twice = block('name="ping">\n', 'name="ping">\n').removeprefix("\n\n<｜DSML｜tool_calls>\n")
    assert follow(matchers(spec), small, twice) != twice
    assert follow(matchers(spec), small, '<｜DSML｜invoke name="get') != '<｜DSML｜invoke name="get'


async def test_with_tools_an_answer_format_allows_either(planner, matchers, small):
    rendered = chat(THINKING, tools=(WEATHER,))
    spec = await planner.for_chat(rendered, json_schema_format(PERSON, "p"), "p")
    for output in ('Hm</think>{"name": "A", "age": 1}', f"Hm</think>{block(OSLO)}", f"Hm{block(OSLO)}"):
        matcher = matchers(spec)
        assert follow(matcher, small, output) == output
        assert matcher.is_done
    assert follow(matchers(spec), small, "Hm</think>Well") == "Hm</think>"
    # A tool tag inside the reasoning ends it only where the parser sees one, too.
    quoted = "The token ｜DSML｜ is odd.</think>"
    assert follow(matchers(spec), small, quoted) == quoted


async def test_strict_tools_bind_their_calls_and_nothing_else(planner, matchers, small):
    strict = Tool(name=WEATHER.name, parameters=WEATHER.parameters, strict=True)
    assert await planner.for_chat(chat(tools=(WEATHER, PING)), None, "tools") is None
    spec = await planner.for_chat(chat(tools=(strict, PING)), None, "tools")
    matcher = matchers(spec)
    assert small.eos_id in mask_of(matcher, small)
    assert follow(matcher, small, "Any <text> at all.") == "Any <text> at all."
    good = block(OSLO, 'name="ping">\n' + string("free", "x"))
    assert follow(matcher, small, good) == good
    assert matcher.is_done
    assert follow(matchers(spec), small, block(OSLO.replace(">c<", ">k<"))) != block(OSLO.replace(">c<", ">k<"))
    matcher = matchers(spec)
    matcher.accept(small.eos_id)
    assert matcher.is_done


async def test_one_call_at_most_without_parallel_calls(planner, matchers, small):
    spec = await planner.for_chat(chat(tools=(WEATHER, PING)), None, "tools", single_call=True)
    once, twice = block('name="ping">\n'), block('name="ping">\n', 'name="ping">\n')
    assert follow(matchers(spec), small, once) == once
    assert follow(matchers(spec), small, twice) != twice


async def test_an_unenforceable_tool_schema_is_an_error_only_when_strict(planner, matchers, small):
    odd = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}, "required": ["x"]}
    rendered = chat(tools=(PING, Tool(name="odd", parameters=odd)), tool_choice="required")
    spec = await planner.for_chat(rendered, None, "tools")
    free = f'<｜DSML｜invoke name="odd">\n{other("any", "[1]")}</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    assert follow(matchers(spec), small, free) == free
    strict = chat(tools=(PING, Tool(name="odd", parameters=odd, strict=True)), tool_choice="required")
    with pytest.raises(RequestError, match="uniqueItems") as caught:
        await planner.for_chat(strict, None, "tools")
    assert caught.value.param == "tools.1.function.parameters"


async def test_a_continued_answer_goes_on_where_the_prompt_stopped(planner, matchers, small):
    begun = AssistantMessage(content='{"name": "An', continued=True)
    rendered = chat(messages=(*ASK, begun))
    assert rendered.answer_prefix == begun.content
    matcher = matchers(await planner.for_chat(rendered, json_schema_format(PERSON, "p"), "p"))
    assert follow(matcher, small, 'n", "age": 3}') == 'n", "age": 3}'
    assert matcher.is_done
    wrong = chat(messages=(*ASK, AssistantMessage(content="Well", continued=True)))
    with pytest.raises(RequestError, match="continue"):
        await planner.for_chat(wrong, json_schema_format(PERSON, "p"), "p")


PLACE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
OLD_TAGS = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=x>", "schema": PLACE, "end": "</f>"},
        {"begin": "<f=y>", "schema": {"type": "string"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
SEQUENCE = {
    "type": "sequence",
    "elements": [
        {"type": "const_string", "value": "A/"},
        {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
        {
            "type": "or",
            "elements": [{"type": "regex", "pattern": "[0-9]+/x"}, {"type": "json_schema", "json_schema": PLACE}],
        },
    ],
}
TRIGGERED = {
    "type": "triggered_tags",
    "triggers": ["<a"],
    "tags": [
        {"begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"},
        {"begin": "<ab>", "content": {"type": "regex", "pattern": "x+"}, "end": ""},
    ],
}


@pytest.mark.parametrize(
    ("tag", "good", "bad"),
    [
        (OLD_TAGS, ["hello", 'hi <f=x>{"a": 1}</f> and <f=y>"q"</f>'], ["hi <f=z>", 'hi <f=x>{"b"']),
        ({"format": SEQUENCE}, ["A/<t>foo < bar</t>12/x", 'A/<t></t>{"a":2}'], ["A/<t></t>b", "B"]),
        ({"format": TRIGGERED}, ["t <a>zz</a> t", "t <ab>xx"], ["t <ac", "<abx"]),
    ],
)
async def test_structural_tags_bind_only_what_they_begin(planner, matchers, small, tag, good, bad):
    spec = await planner.for_text(structural_tag_format(tag, "p"), "p")
    for text in good:
        matcher = matchers(spec)
        assert follow(matcher, small, text) == text
        assert can_end(matcher, small)
    for text in bad:
        assert follow(matchers(spec), small, text) != text


@pytest.mark.parametrize(
    "tag",
    [
        "x",
        {},
        {"structures": [{"begin": "<f>", "schema": 3, "end": ""}], "triggers": ["<f"]},
        {"structures": [{"begin": "<f>", "schema": {}, "end": ""}], "triggers": ["<g"]},
        {"structures": [{"begin": "<f>", "schema": {}, "end": ""}], "triggers": []},
        {"format": {"type": "music"}},
        {"format": {"type": "sequence", "elements": []}},
        {"format": {**TRIGGERED, "at_least_one": True}},
    ],
)
def test_malformed_structural_tags_are_refused(tag):
    with pytest.raises(RequestError) as caught:
        structural_tag_format(tag, "f")
    assert caught.value.param == "f"


def test_structural_tags_too_deep_are_refused():
    nested = {"type": "any_text"}
    for _ in range(5000):
        nested = {"type": "sequence", "elements": [nested]}
    with pytest.raises(RequestError, match="deep"):
        structural_tag_format({"format": nested}, "f")


def deep(levels):
    return {"type": "object", "properties": {"a": deep(levels - 1)}} if levels else {"type": "string"}


@pytest.mark.parametrize(
    "build",
    [
        lambda: json_schema_format({"type": "foo"}, "f"),
        lambda: json_schema_format({"$ref": "#/nowhere"}, "f"),
        lambda: json_schema_format({"type": "array", "uniqueItems": True}, "f"),
        lambda: json_schema_format({"type": "string", "pattern": "(a"}, "f"),
        lambda: json_schema_format("{", "f"),
        lambda: json_schema_format([1], "f"),
        lambda: json_schema_format(deep(200), "f"),
        lambda: json_schema_format({"type": "object", "properties": {str(i): {} for i in range(600)}}, "f"),
        lambda: json_schema_format({"enum": ["x" * 1000] * 200}, "f"),
        lambda: regex_format("(a", "f"),
        lambda: regex_format("a" * (MAX_GRAMMAR_CHARS + 1), "f"),
        lambda: choice_format([], "f"),
        lambda: choice_format(["a", 1], "f"),
        lambda: grammar_format("start: nowhere", "f"),
        lambda: grammar_format("root ::= (", "f"),
    ],
)
async def test_what_cannot_be_enforced_is_the_callers_mistake(planner, build):
    with pytest.raises(RequestError) as caught:
        await planner.for_text(build(), "f")
    assert caught.value.param == "f"
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400


async def test_a_checked_grammar_is_not_compiled_again(planner):
    wide = json_schema_format({"type": "object", "properties": {f"key{i}": {} for i in range(300)}}, "f")
    await planner.for_text(wide, "f")
    start = time.perf_counter()
    for _ in range(20):
        await planner.for_text(wide, "f")
    assert time.perf_counter() - start < 0.1


async def test_a_queue_of_grammars_that_is_too_long_is_no_fault_of_the_grammar(small, monkeypatch):
    monkeypatch.setattr("api.grammar.CHECK_TIMEOUT_S", 0.05)
    planner = GrammarPlanner(small)
    release = threading.Event()
    planner._checker._thread.submit(release.wait, 10)
    with pytest.raises(Overloaded, match="wait longer"):
        await planner.for_text(json_object_format(), "f")
    release.set()
    monkeypatch.setattr("api.grammar.CHECK_TIMEOUT_S", 10)
    assert await planner.for_text(json_object_format(), "f")
    planner.close()


@pytest.mark.parametrize("budget", [0, 1, 5])
async def test_a_thinking_budget_ends_the_reasoning_and_binds_nothing_else(planner, matchers, small, budget):
    spec = await planner.for_chat(chat(THINKING, tools=(PING,)), None, "p", thinking_budget=budget)
    matcher = matchers(spec)
    reasoning = small.encode("abcdefgh")[:budget]
    end = small.id_of(markers.THINK_CLOSE)
    for token_id in reasoning:
        assert {token_id, end, small.eos_id} <= mask_of(matcher, small)
        matcher.accept(token_id)
    assert mask_of(matcher, small) == {end}
    with pytest.raises(RequestError, match=f"{budget} tokens of reasoning"):
        matcher.accept(small.encode("x")[0])
    matcher.accept(end)
    answer = "An answer that is longer." + block('name="ping">\n\n')
    assert follow(matcher, small, answer) == answer
    assert can_end(matcher, small)


async def test_a_thinking_budget_leaves_reasoning_that_ends_by_itself_alone(planner, matchers, small):
    spec = await planner.for_chat(chat(THINKING), None, "p", thinking_budget=20)
    assert follow(matchers(spec), small, "short</think>" + "x" * 50) == "short</think>" + "x" * 50
    # A tool call that the model begins inside the reasoning ends it too, and is not cut in two.
    spec = await planner.for_chat(chat(THINKING, tools=(WEATHER,)), None, "p", thinking_budget=8)
    call = "hm" + block(OSLO)
    assert follow(matchers(spec), small, call) == call


async def test_a_thinking_budget_goes_with_a_format_and_without_thinking_means_nothing(planner, matchers, small):
    spec = await planner.for_chat(chat(THINKING), json_schema_format(PERSON, "p"), "p", thinking_budget=2)
    matcher = matchers(spec)
    assert follow(matcher, small, "abc") == small.decode(small.encode("abc")[:2])
    assert follow(matcher, small, '</think>{"name": "Ann", "age": 3}').endswith("3}")
    assert await planner.for_chat(chat(PLAIN), None, "p", thinking_budget=2) is None


def test_bytes_that_are_no_constraint_are_refused(matchers):
    with pytest.raises(RequestError):
        matchers(b"\x00nonsense")


def test_a_token_that_was_not_allowed_is_an_error_not_a_crash(matchers, small):
    matcher = matchers(encode_constraint(Constraint(grammar='{"grammars": [{"lark_grammar": "start: \\"a\\""}]}')))
    with pytest.raises(RequestError, match="grammar"):
        matcher.accept(small.encode("b")[0])


async def sample(spec, matchers, tokenizer, rng):
    """Choose at random among the allowed tokens, with a liking for what comes to an end."""
    matcher, token_ids = matchers(spec), []
    dsml, close = tokenizer.token_id(markers.DSML), tokenizer.token_id("</")
    single = [
        i
        for i in range(tokenizer.vocab_size)
        if len(tokenizer.token_bytes(i)) == 1 and tokenizer.token_text(i).isascii()
    ]
    quotes = tokenizer.encode('"}')
    while not matcher.is_done:
        assert len(token_ids) < 3000
        allowed = mask_of(matcher, tokenizer)
        liked = [i for i in (dsml, close, *quotes, tokenizer.token_id(markers.THINK_CLOSE)) if i in allowed]
        usual = [i for i in single if i in allowed]
        choice = (
            rng.choice(liked) if liked and (rng.random() < 0.3 or not usual) else rng.choice(usual or sorted(allowed))
        )
        token_ids.append(choice)
        matcher.accept(choice)
    return token_ids


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_is_sampled_under_a_schema_validates(planner, matchers, small, seed):
    spec = await planner.for_chat(chat(), json_schema_format(PERSON, "p"), "p")
    token_ids = await sample(spec, matchers, small, random.Random(seed))
    jsonschema.validate(json.loads(small.decode(token_ids)), PERSON)


@pytest.mark.parametrize("mode", [THINKING, PLAIN], ids=["thinking", "plain"])
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_sampled_for_a_required_call_parses_and_validates(planner, matchers, small, mode, seed):
    rendered = chat(mode, tools=(WEATHER, PING), tool_choice="required")
    spec = await planner.for_chat(rendered, None, "tools")
    parser = OutputParser(rendered.start, tools=True, tokenizer=small)
    events = parser.feed(await sample(spec, matchers, small, random.Random(seed)))
    message = collect(events + parser.finish("stop"))
    assert message["tool_calls"]
    assert message["content"] == ""
    for call in message["tool_calls"]:
        [tool] = [tool for tool in (WEATHER, PING) if tool.name == call["name"]]
        jsonschema.validate(json.loads(call["arguments"]), {**tool.parameters, "additionalProperties": False})


async def test_v4_tokens_follow_a_grammar_quickly(v4, v4_folder):
    planner, matchers = GrammarPlanner(v4), GrammarMatchers(v4_folder)
    rendered = chat(THINKING, tools=(WEATHER,), tool_choice="required")
    matcher = matchers(await planner.for_chat(rendered, None, "tools"))
    row = np.zeros(129_280 // 32, np.int32)
    text = f"Hm.</think>{block(OSLO)}"
    times = []
    for token_id in v4.encode(text):
        start = time.perf_counter()
        matcher.fill_bitmask(row)
        times.append(time.perf_counter() - start)
        assert row[token_id // 32] >> (token_id % 32) & 1
        matcher.accept(token_id)
    assert matcher.is_done
    assert sorted(times)[len(times) // 2] < 0.02
    planner.close()
    matchers.close()
