"""Messages as JSON -> typed messages. Every mistake is a RequestError that names the place, never the content."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from api.encoding.markers import TASKS
from api.encoding.messages import (
    AssistantMessage,
    Message,
    ReminderMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from runtime.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_PART_TYPE = re.compile(r"[a-zA-Z0-9_.-]{1,40}")


def parse_messages(values: object) -> tuple[Message, ...]:
    """Read `messages` of a chat request. `developer` becomes system; `prefix: true` marks a turn to continue."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise _error("messages", "must be a list")
    if not values:
        raise _error("messages", "must hold at least one message")
    messages = tuple(parse_message(value, f"messages.{index}") for index, value in enumerate(values))
    for index, message in enumerate(messages[:-1]):
        if isinstance(message, AssistantMessage) and message.continued:
            raise _error(f"messages.{index}.prefix", "only the last message can be continued")
    return messages


def parse_message(value: object, where: str) -> Message:
    """Read one message; `where` is its place in the request, in dotted form."""
    if not isinstance(value, Mapping):
        raise _error(where, f"must be an object, not {_kind(value)}")
    role = value.get("role")
    if role in ("system", "developer"):
        return SystemMessage(content=content_text(value.get("content"), f"{where}.content", default=""))
    if role == "user":
        return UserMessage(content=content_text(value.get("content"), f"{where}.content"), task=_task(value, where))
    if role == "assistant":
        return _assistant(value, where)
    if role == "tool":
        return ToolMessage(
            content=content_text(value.get("content"), f"{where}.content", default=""),
            tool_call_id=_optional_string(value, "tool_call_id", where),
        )
    if role == "latest_reminder":
        return ReminderMessage(content=content_text(value.get("content"), f"{where}.content"))
    raise _error(f"{where}.role", f"must be one of {', '.join(ROLES)}")


def content_text(content: object, where: str, *, default: str | None = None) -> str:
    """The text of a message's content: a string, or a list of text parts, which are joined by a blank line."""
    if isinstance(content, str):
        return content
    if content is None:
        if default is None:
            raise _error(where, "must be a string or a list of text parts, not null")
        return default
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise _error(where, f"must be a string or a list of text parts, not {_kind(content)}")
    return "\n\n".join(_part_text(part, f"{where}.{index}") for index, part in enumerate(content))


def parse_tool_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """Read the `tool_calls` of an assistant message."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _error(where, f"must be a list, not {_kind(value)}")
    return tuple(_tool_call(call, f"{where}.{index}") for index, call in enumerate(value))


def check_tool_results(messages: Sequence[Message]) -> None:
    """Every tool call needs its result before the next assistant turn, and every result its call.

    Where ids are missing, calls and results are matched by number.
    """
    waiting = _Waiting()
    for index, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            waiting.refuse_rest()
            waiting = _Waiting(message.tool_calls, index)
        elif isinstance(message, ToolMessage):
            waiting.answer(message.tool_call_id, index)
    waiting.refuse_rest()


class _Waiting:
    """The calls of one assistant message that have no result yet."""

    def __init__(self, calls: Sequence[ToolCall] = (), index: int = 0) -> None:
        ids = [call.id for call in calls if call.id is not None]
        self._index = index
        self._ids = dict.fromkeys(ids)
        self._num_nameless = len(calls) - len(ids)
        if len(self._ids) < len(ids):
            raise _error(f"messages.{index}.tool_calls", "two calls have the same id")

    def answer(self, call_id: str | None, index: int) -> None:
        if call_id in self._ids:
            del self._ids[call_id]
        elif self._num_nameless:
            self._num_nameless -= 1
        elif not self._ids:
            raise _error(f"messages.{index}", "a tool message must answer a tool call of an assistant message")
        elif call_id is None:
            del self._ids[next(iter(self._ids))]
        else:
            raise _error(f"messages.{index}.tool_call_id", "answers no tool call of the last assistant message")

    def refuse_rest(self) -> None:
        count = len(self._ids) + self._num_nameless
        if count:
            raise _error(
                f"messages.{self._index}.tool_calls",
                f"{count} tool call(s) without an answering tool message before the next assistant turn",
            )


def _assistant(value: Mapping[str, Any], where: str) -> AssistantMessage:
    reasoning = _optional_string(value, "reasoning_content", where)
    if reasoning is None:
        reasoning = _optional_string(value, "reasoning", where)
    prefix = value.get("prefix")
    if prefix is not None and not isinstance(prefix, bool):
        raise _error(f"{where}.prefix", "must be true or false")
    return AssistantMessage(
        content=content_text(value.get("content"), f"{where}.content", default=""),
        reasoning=reasoning or "",
        tool_calls=parse_tool_calls(value.get("tool_calls"), f"{where}.tool_calls"),
        task=_task(value, where),
        continued=bool(prefix),
    )


def _tool_call(value: object, where: str) -> ToolCall:
    if not isinstance(value, Mapping):
        raise _error(where, f"must be an object, not {_kind(value)}")
    function = value.get("function")
    if not isinstance(function, Mapping):
        raise _error(f"{where}.function", f"must be an object, not {_kind(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _error(f"{where}.function.name", "must be a non-empty string")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = "{}"
    if not isinstance(arguments, str | Mapping):
        raise _error(f"{where}.function.arguments", f"must be a string or an object, not {_kind(arguments)}")
    return ToolCall(name=name, arguments=arguments, id=_optional_string(value, "id", where) or None)


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise _error(where, f"must be an object, not {_kind(part)}")
    kind = part.get("type")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        shown = f" {kind!r}" if isinstance(kind, str) and _PART_TYPE.fullmatch(kind) else ""
        raise _error(f"{where}.type", f"content part{shown} is not supported: this model reads text only")
    text = part.get(key)
    if not isinstance(text, str):
        raise _error(f"{where}.{key}", f"must be a string, not {_kind(text)}")
    return text


def _task(value: Mapping[str, Any], where: str) -> str | None:
    task = value.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        raise _error(f"{where}.task", f"must be one of {', '.join(TASKS)}")
    return task


def _optional_string(value: Mapping[str, Any], key: str, where: str) -> str | None:
    found = value.get(key)
    if found is None or isinstance(found, str):
        return found
    raise _error(f"{where}.{key}", f"must be a string, not {_kind(found)}")


def _kind(value: object) -> str:
    """The JSON type of a value, for messages."""
    if value is None:
        return "null"
    kinds = ((bool, "a boolean"), (int | float, "a number"), (str, "a string"), (Mapping, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "a list")


def _error(where: str, problem: str) -> RequestError:
    return RequestError(f"{where}: {problem}", param=where)
