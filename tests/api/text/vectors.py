"""Vectors of tests/api/vectors, and how their inputs map onto our types."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api.chat import ChatRequest, NamedTool, Tool
from api.chat_messages import parse_messages
from api.chat_mode import resolve_mode
from api.encoding.blocks import JSON_OBJECT_TEXT, schema_format_text
from api.encoding.effort import EffortProfile

FOLDER = Path(__file__).parents[1] / "vectors"
DECISIONS: dict[str, dict[str, Any]] = json.loads((FOLDER / "decisions.json").read_text(encoding="utf-8"))
"""File -> vector -> {"reason", and what we do instead}."""


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def decided(name: str, vector: Mapping[str, Any]) -> dict[str, Any]:
    """What we expect of a vector: its own expectation, or the decision written beside it."""
    decision = DECISIONS.get(name, {}).get(vector["name"])
    if decision is None:
        return vector["expected"]
    return {key: value for key, value in decision.items() if key != "reason"}


def chat_request(body: Mapping[str, Any], profile: EffortProfile) -> ChatRequest:
    """A whole Chat Completions body, for the fields that shape the prompt."""
    choice = body.get("tool_choice", "auto")
    form = body.get("response_format") or {"type": "text"}
    return ChatRequest(
        messages=parse_messages(body["messages"]),
        mode=resolve_mode(
            profile=profile,
            default_thinking=True,
            reasoning_effort=body.get("reasoning_effort"),
            thinking=(body.get("thinking") or {}).get("type"),
            template_kwargs=body.get("chat_template_kwargs"),
        ),
        tools=tuple(tool(value["function"]) for value in body.get("tools") or ()),
        tool_choice=NamedTool(choice["function"]["name"]) if isinstance(choice, dict) else choice,
        format_text={
            "text": lambda: "",
            "json_object": lambda: JSON_OBJECT_TEXT,
            "json_schema": lambda: schema_format_text(form["json_schema"]["schema"]),
        }[form["type"]](),
        continue_final=bool(body.get("continue_final_message")),
    )


def tool(function: Mapping[str, Any]) -> Tool:
    return Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters=function.get("parameters") or {},
    )
