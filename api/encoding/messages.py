"""The messages of a conversation as the renderer takes them: one frozen type per role."""

from collections.abc import Mapping
from typing import Any

import msgspec

Json = Any
"""A decoded JSON value."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call the assistant made. `arguments` is the JSON text the API carries, or the object itself."""

    name: str
    arguments: str | Mapping[str, Json]
    id: str | None = None


class SystemMessage(msgspec.Struct, frozen=True, kw_only=True):
    """`tools` are the OpenAI `function` objects to list; `format_text` is the response-format block to append."""

    content: str = ""
    tools: tuple[Mapping[str, Json], ...] = ()
    format_text: str = ""


class DeveloperMessage(msgspec.Struct, frozen=True, kw_only=True):
    """DeepSeek's internal role, rendered as a user turn. The API maps OpenAI's `developer` to system instead."""

    content: str
    tools: tuple[Mapping[str, Json], ...] = ()
    format_text: str = ""
    task: str | None = None


class UserMessage(msgspec.Struct, frozen=True, kw_only=True):
    content: str
    task: str | None = None


class ToolMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one tool call."""

    content: str
    tool_call_id: str | None = None


class ReminderMessage(msgspec.Struct, frozen=True, kw_only=True):
    content: str


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """`continued` means that the model goes on from here: no end-of-sentence token."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    task: str | None = None
    continued: bool = False


Message = SystemMessage | DeveloperMessage | UserMessage | ToolMessage | ReminderMessage | AssistantMessage
