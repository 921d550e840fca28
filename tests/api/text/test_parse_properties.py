"""Properties of parsing: what was rendered comes back, cuts do not matter, nothing raises."""

import json
import time

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.encoding import markers
from api.encoding.messages import AssistantMessage, SystemMessage, ToolCall, UserMessage
from api.encoding.render import render
from api.parse import OutputParser
from api.parse_events import ContentDelta, Event, ParserStart, ReasoningDelta, StartState
from api.plain_text import PlainText
from runtime.histogram import Histogram
from runtime.requests import Tokens
from tests.api.text.outputs import collect, parse_text, parse_tokens, start_of

D = markers.DSML
SPELLED = [
    *markers.REQUIRED, f"<{D}tool_calls>", f"</{D}tool_calls>", f'<{D}invoke name="f">', f"</{D}invoke>", f"<{D}",
    f'<{D}parameter name="k" string="true">', f"</{D}parameter>", "</", "<", "\n", "\n\n", '"', "\\", "🤔", "é",
]  # fmt: skip
text = st.lists(st.one_of(st.sampled_from(SPELLED), st.text(max_size=6)), max_size=8).map("".join)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
arguments = st.dictionaries(text.filter(lambda key: '"' not in key), json_values, max_size=4)
calls = st.lists(st.tuples(names, arguments), max_size=3)

PIECES = [
    *SPELLED, "tool_calls>", "tool>", f"<{D}toolcalls>\n", f'<{D}invoke name="ping"/>', f"</{D}toolcalls>", "text", " ",
    f'<{D}parameter name="n" string="false">', f'<{D}parameter name="n">', "12", '{"a": 1}', f"<{D}tool_c", "</thi",
]  # fmt: skip
outputs = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=14).map("".join)
starts = st.builds(ParserStart, st.sampled_from(StartState), st.booleans())


def output_of(tokenizer, message, *, thinking):
    """The token ids a model would generate for this assistant message, and where their parser starts."""
    conversation = (SystemMessage(content="S"), UserMessage(content="Q"))
    options = {"thinking": thinking, "drop_reasoning": False}
    prompt = tokenizer.encode_segments(render(conversation, **options))
    whole = tokenizer.encode_segments(render((*conversation, message), **options, generation=False))
    assert whole[: len(prompt)] == prompt
    return whole[len(prompt) :], start_of(thinking)


@settings(max_examples=150, deadline=None)
@given(reasoning=text, content=text, calls=calls, thinking=st.booleans(), data=st.data())
def test_a_rendered_message_is_parsed_back(v4, small, reasoning, content, calls, thinking, data):
    message = AssistantMessage(
        content=content,
        reasoning=reasoning,
        tool_calls=tuple(ToolCall(name=name, arguments=json.dumps(value)) for name, value in calls),
    )
    for tokenizer in (v4, small):
        token_ids, start = output_of(tokenizer, message, thinking=thinking)
        cut = data.draw(st.integers(0, len(token_ids)))
        parsed = parse_tokens([token_ids[:cut], token_ids[cut:]], tokenizer, start, tools=bool(calls), finish="stop")
        assert parsed["reasoning"] == (reasoning.strip("\n") if thinking else "")
        assert parsed["content"] == (content.strip("\n") if calls else content.lstrip("\n"))
        assert [(call["name"], json.loads(call["arguments"])) for call in parsed["tool_calls"]] == calls
        assert parsed["finish_reason"] == ("tool_calls" if calls else "stop")


@settings(max_examples=400, deadline=None)
@given(output=outputs, start=starts, tools=st.booleans(), finish=st.sampled_from(["stop", "length"]), data=st.data())
@example(
    output=f'<think>\n\n</think>\n<{D}tool_calls><{D}invoke name="f"><{D}parameter name="k" string="true">\\"</',
    start=ParserStart(StartState.CONTENT), tools=True, finish="length", data=None,
)  # fmt: skip
def test_cuts_of_text_and_tokens_do_not_matter(v4, output, start, tools, finish, data):
    whole = parse_text([output], start, tools=tools, finish=finish)
    assert parse_text(output, start, tools=tools, finish=finish) == whole
    token_ids = v4.encode(output)
    visible = output.replace(markers.BOS, "").replace(markers.EOS, "")
    by_token = parse_tokens([[token_id] for token_id in token_ids], v4, start, tools=tools, finish=finish)
    assert parse_tokens([token_ids], v4, start, tools=tools, finish=finish) == by_token
    spent = by_token.pop("reasoning_tokens")
    assert 0 <= spent <= len(token_ids)
    if visible == output:
        assert by_token == whole
    if data is not None:
        cut = data.draw(st.integers(0, len(output)))
        assert parse_text([output[:cut], output[cut:]], start, tools=tools, finish=finish) == whole


def plain_text(parser: OutputParser, token_ids: list[int]) -> str:
    """What the parser lets pass unread of one step."""
    plain = PlainText(Histogram((1.0,)))
    plain.frame = (b'"', b'"')
    plain.open(parser.plain_words, 0.0)
    text = plain.take(Tokens("r", tuple(token_ids)), 0.0)
    parser.took(plain.num_tokens)
    assert bool(text) == bool(plain.num_tokens)
    return str(orjson.loads(text)) if text else ""


@settings(max_examples=400, deadline=None)
@given(output=outputs, start=starts, tools=st.booleans(), data=st.data())
@example(output="a\n\n</think>\nb<", start=start_of(True), tools=True, data=None)
def test_plain_steps_are_what_feeding_them_would_have_given(v4, output, start, tools, data):
    token_ids = v4.encode(output)
    sizes = [1] * len(token_ids) if data is None else data.draw(st.lists(st.integers(1, 3), min_size=len(token_ids)))
    fed, quick = (OutputParser(start, tools=tools, tokenizer=v4) for _ in range(2))
    position = 0
    for size in sizes:
        group = token_ids[position : position + size]
        position += size
        expected: list[Event] = fed.feed(group)
        text = plain_text(quick, group)
        if text:
            assert expected == [(ReasoningDelta if quick.in_reasoning else ContentDelta)(text)]
        else:
            assert quick.feed(group) == expected
        assert (quick.state, quick.reasoning_tokens) == (fed.state, fed.reasoning_tokens)
    assert quick.finish("length") == fed.finish("length")


def test_nearly_all_of_an_ordinary_answer_is_plain(v4):
    token_ids = v4.encode_plain("The quick brown fox jumps over the lazy dog, and 你好 to <b>you</b> too. " * 20)
    parser = OutputParser(start_of(False), tools=True, tokenizer=v4)
    num_plain = 0
    for token_id in token_ids:
        if plain_text(parser, [token_id]):
            num_plain += 1
        else:
            parser.feed([token_id])
    assert num_plain > 0.8 * len(token_ids)


@settings(max_examples=300, deadline=None)
@given(output=outputs, start=starts)
def test_calls_that_the_model_ended_have_whole_arguments(output, start):
    parser = OutputParser(start, tools=True)
    message = collect(parser.feed_text(output) + parser.finish("stop"))
    for call in message["tool_calls"]:
        assert isinstance(json.loads(call["arguments"]), dict)


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_a_call_that_ends_at_any_place_has_what_was_written_so_far(finish):
    # Each piece of the output, and the arguments when it ends behind it.
    pieces = [
        (f'<{D}tool_calls>\n<{D}invoke name="f"', ""),
        (f">\n<{D}par", ""),
        ('ameter name="', '{"'),
        ('a"', None),
        (' string="', '{"a": '),
        ('true">', '{"a": "'),
        ("x\ny", None),
        (f"</{D}", '{"a": "x\\ny"'),
        (f"parameter>\n<{D}par", '{"a": "x\\ny"'),
        ('ameter name="', '{"a": "x\\ny", "'),
        ('b" string="false">', None),
        ("[1]", None),
        (f"</{D}", '{"a": "x\\ny", "b": [1]'),
        ("parameter>\n</", '{"a": "x\\ny", "b": [1]'),
        (f"{D}", '{"a": "x\\ny", "b": [1]}'),
        (f"invoke>\n</{D}tool_calls>", '{"a": "x\\ny", "b": [1]}'),
    ]
    output = ""
    for piece, so_far in pieces:
        output += piece
        calls = parse_text(list(output), start_of(False), tools=True, finish=finish)["tool_calls"]
        assert [call["name"] for call in calls] == ["f"]
        given = calls[0]["arguments"]
        if finish == "stop":
            assert isinstance(json.loads(given), dict)
        elif so_far is not None:
            assert given == so_far, output


@settings(max_examples=200, deadline=None)
@given(output=outputs, start=starts)
def test_without_tools_no_text_becomes_a_call(output, start):
    if start.state is not StartState.TOOL:
        assert parse_text([output], start, tools=False, finish="stop")["tool_calls"] == []


@pytest.mark.parametrize("spelling", ["</think>", '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">'])
def test_a_marker_that_the_model_only_spells_out_is_text(v4, spelling):
    token_ids = [*v4.encode_plain(f"It says {spelling} there."), v4.token_id(markers.THINK_CLOSE), *v4.encode("Yes")]
    parsed = parse_tokens([token_ids], v4, start_of(True), tools=True, finish="stop")
    assert parsed["reasoning"] == f"It says {spelling} there."
    assert parsed["content"] == "Yes"
    assert parsed["reasoning_tokens"] == len(token_ids) - 2


IN_CALL = f'<{D}tool_calls>\n<{D}invoke name="f">\n'


@pytest.mark.parametrize(
    ("head", "unit"),
    [
        ("x", "\n"),
        ("x", "<"),
        ("x", f"<{D}tool_calls"),
        ("", "</think>"),
        (f'<{D}tool_calls><{D}invoke name="', "abc"),
        (IN_CALL, "abc"),
        (IN_CALL, "\n"),
        (f'{IN_CALL}<{D}parameter name="', "abc"),
        (f'{IN_CALL}<{D}parameter name="k" ', "abc"),
        (f'{IN_CALL}<{D}parameter name="k" string="true">', f"</{D}x"),
        (f'{IN_CALL}<{D}parameter name="k" string="false">', "123,"),
        (f"{IN_CALL}{{", "123,"),
    ],
)
def test_endless_repetition_costs_the_same_per_token_from_beginning_to_end(head, unit):
    parser = OutputParser(start_of(False), tools=True)
    parser.feed_text(head)

    def spend(count):
        begin = time.process_time()
        for _ in range(count):
            parser.feed_text(unit)
        return time.process_time() - begin

    early = min(spend(2000) for _ in range(3))
    spend(40_000)
    late = min(spend(2000) for _ in range(3))
    parser.finish("length")
    assert late < 5 * early + 0.02
