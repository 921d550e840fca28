"""The encoder published with the checkpoint: same arguments, same prompts. For tools and comparisons, not for serving.

Unlike the API it takes `tools`, `response_format`, `task` and `wo_eos` on the messages themselves, wraps call arguments
that are an object into a parameter named `arguments`, keeps `developer` as a role, leaves system messages where they
stand, and adds a generation prompt only after a user turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec.structs import replace

from api.chat_messages import content_text, parse_message
from api.encoding.blocks import schema_format_text
from api.encoding.effort import EffortProfile
from api.encoding.markers import TASKS
from api.encoding.messages import AssistantMessage, DeveloperMessage, Message, SystemMessage
from api.encoding.render import Order, render
from api.encoding.segments import Segments
from runtime.errors import RequestError


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking_mode: Literal["chat", "thinking"],
    reasoning_effort: str | None = None,
    context: Sequence[Mapping[str, Any]] = (),
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    profile: EffortProfile = EffortProfile.PREVIEW,
) -> Segments:
    """Render a conversation. Where the published encoder crashes or prints Python values, this one is the API's.

    Raises RequestError for unknown roles, tasks and efforts, and for an empty developer message.
    """
    texts = profile.texts()
    if reasoning_effort is not None and reasoning_effort not in texts:
        raise RequestError(
            f"reasoning_effort: the {profile.value} profile knows {', '.join(texts)}", param="reasoning_effort"
        )
    return render(
        [_message(message, f"messages.{index}") for index, message in enumerate(messages)],
        thinking=thinking_mode == "thinking",
        effort_text="" if reasoning_effort is None else texts[reasoning_effort],
        drop_reasoning=drop_thinking,
        context=[_message(message, f"context.{index}") for index, message in enumerate(context)],
        bos=add_default_bos_token,
        order=Order.CHECKPOINT,
    )


def _message(value: Mapping[str, Any], where: str) -> Message:
    if value.get("role") == "developer":
        content = content_text(value.get("content"), f"{where}.content", default="")
        if not content:
            raise RequestError(f"{where}.content: a developer message must not be empty", param=where)
        task = value.get("task")
        if task is not None and task not in TASKS:
            raise RequestError(f"{where}.task: must be one of {', '.join(TASKS)}", param=where)
        return DeveloperMessage(content=content, tools=_tools(value), format_text=_format_text(value), task=task)
    message = parse_message(value, where)
    if isinstance(message, SystemMessage):
        return replace(message, tools=_tools(value), format_text=_format_text(value))
    if isinstance(message, AssistantMessage):
        calls = tuple(
            call if isinstance(call.arguments, str) else replace(call, arguments={"arguments": call.arguments})
            for call in message.tool_calls
        )
        return replace(message, tool_calls=calls, continued=bool(value.get("wo_eos")))
    return message


def _tools(value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return tuple(tool["function"] for tool in value.get("tools") or ())


def _format_text(value: Mapping[str, Any]) -> str:
    schema = value.get("response_format")
    return "" if not schema else schema_format_text(schema)
