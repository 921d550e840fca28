"""Running outputs through the parser in every kind of cut, and comparing whole results."""

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from api.parse import OutputParser
from api.parse_events import (
    ContentDelta,
    Event,
    ParserStart,
    ReasoningDelta,
    StartState,
    ToolArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
)


def start_of(thinking: bool) -> ParserStart:
    return ParserStart(StartState.REASONING if thinking else StartState.CONTENT)


def collect(events: Iterable[Event]) -> dict[str, Any]:
    """The whole message that a client would put together."""
    reasoning, content, calls = "", "", []
    for event in events:
        if isinstance(event, ReasoningDelta):
            assert not calls
            assert event.text
            reasoning += event.text
        elif isinstance(event, ContentDelta):
            assert not calls
            assert event.text
            content += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(calls)
            calls.append({"name": event.name, "arguments": "", "ended": False})
        else:
            assert event.index == len(calls) - 1
            assert not calls[-1]["ended"]
            if isinstance(event, ToolArgumentsDelta):
                assert event.text
                calls[-1]["arguments"] += event.text
            else:
                assert isinstance(event, ToolCallEnd)
                assert isinstance(json.loads(calls[-1]["arguments"]), dict)
                calls[-1]["ended"] = True
    return {
        "reasoning": reasoning,
        "content": content,
        "tool_calls": [{"name": call["name"], "arguments": call["arguments"]} for call in calls],
    }


def parse_text(chunks: Iterable[str], start: ParserStart, *, tools: bool, finish: str) -> dict[str, Any]:
    parser = OutputParser(start, tools=tools)
    events = [event for chunk in chunks for event in parser.feed_text(chunk)]
    return finished(collect([*events, *parser.finish(finish)]), finish)


def parse_tokens(groups: Iterable[Sequence[int]], tokenizer, start, *, tools: bool, finish: str) -> dict[str, Any]:
    parser = OutputParser(start, tools=tools, tokenizer=tokenizer)
    events = [event for group in groups for event in parser.feed(group)]
    message = finished(collect([*events, *parser.finish(finish)]), finish)
    return message | {"reasoning_tokens": parser.reasoning_tokens}


def finished(message: dict[str, Any], reason: str) -> dict[str, Any]:
    """A message with the finish reason that the API reports for the engine's."""
    return message | {"finish_reason": "tool_calls" if reason == "stop" and message["tool_calls"] else reason}


def random_cuts(items: Sequence[Any], seed: object, *, largest: int) -> list[Any]:
    """Cut a text or a list of ids at random places."""
    rng = random.Random(repr(seed))
    cuts, position = [], 0
    while position < len(items):
        size = rng.randint(1, largest)
        cuts.append(items[position : position + size])
        position += size
    return cuts
