import pytest

from api.chat_output import ChatOutput
from api.parse_events import ParserStart, StartState
from api.text_output import TextRules
from runtime.requests import Tokens
from tests.api.text import vectors
from tests.api.text.outputs import collect, finished, parse_text, parse_tokens, random_cuts, start_of

PARSE = vectors.load("parse.json")["vectors"]
MODES = vectors.load("parse-modes.json")["vectors"]
DELTAS = vectors.load("stream-deltas.json")["vectors"]
STAGES = {
    None: ParserStart(StartState.CONTENT),
    "ReasoningStart": ParserStart(StartState.REASONING),
    "ReasoningContinuation": ParserStart(StartState.REASONING, continuation=True),
    "ContentContinuation": ParserStart(StartState.CONTENT, continuation=True),
}


def by_name(vector):
    return vector["name"]


def without_objects(expected):
    calls = [{"name": call["name"], "arguments": call["arguments"]} for call in expected["tool_calls"]]
    return {**expected, "tool_calls": calls}


@pytest.mark.parametrize("vector", PARSE, ids=by_name)
def test_whole_texts_and_texts_cut_anywhere(vector):
    given, expected = vector["input"], without_objects(vectors.decided("parse.json", vector))
    for seed in range(25):
        chunks = [given["text"]] if seed == 0 else random_cuts(given["text"], (vector["name"], seed), largest=2 + seed)
        start = start_of(given["thinking"])
        assert parse_text(chunks, start, tools=given["tools"], finish=given["finish"]) == expected


@pytest.mark.parametrize("vector", PARSE, ids=by_name)
def test_tokens_in_any_groups(v4, vector):
    given, expected = vector["input"], without_objects(vectors.decided("parse.json", vector))
    spent = set()
    for seed in range(25):
        ids = given["token_ids"]
        groups = random_cuts(ids, (vector["name"], seed), largest=len(ids) + 1 if seed == 0 else seed)
        start = start_of(given["thinking"])
        result = parse_tokens(groups, v4, start, tools=given["tools"], finish=given["finish"])
        spent.add(result.pop("reasoning_tokens"))
        assert result == expected
    assert len(spent) == 1


@pytest.mark.parametrize("vector", MODES, ids=by_name)
def test_other_starts_and_stop_strings(v4, vector):
    given, expected = vector["input"], vectors.decided("parse-modes.json", vector)
    start = ParserStart(StartState.TOOL) if given["starts_in_tool_calls"] else STAGES[given["start_stage"]]
    ids = v4.encode(given["text"])
    for seed in range(20):
        output = ChatOutput(v4, TextRules(stops=tuple(given["stop"] or ())), start, tools=given["tools"])
        groups = [tuple(group) for group in random_cuts(ids, seed, largest=1 + seed)]
        events, reason = [], None
        for group in [*groups, ()]:
            piece = output.feed(Tokens("r", group, finish_reason=None if group else given["finish"]))
            events += piece.events
            reason = piece.finish_reason
            if reason is not None:
                break
        assert finished(collect(events), reason) == expected


@pytest.mark.parametrize("vector", DELTAS, ids=by_name)
def test_streams_add_up_to_the_same_message(v4, vector):
    given = vector["input"]
    start = start_of(given["thinking"])
    if "chunks" in given:
        result = parse_text(given["chunks"], start, tools=given["tools"], finish=given["finish"])
    else:
        groups = [[token_id] for token_id in given["token_ids"]]
        result = parse_tokens(groups, v4, start, tools=given["tools"], finish=given["finish"])
        del result["reasoning_tokens"]
    wanted = {"reasoning": "", "content": "", "tool_calls": [], "finish_reason": None}
    for chunk in vector["expected"]["deltas"]:
        delta = chunk["delta"]
        wanted["reasoning"] += delta.get("reasoning_content", "")
        wanted["content"] += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                wanted["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            wanted["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        wanted["finish_reason"] = chunk.get("finish_reason")
    assert result == wanted
