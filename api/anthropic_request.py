"""An Anthropic Messages body as the chat it means."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from api.anthropic_schema import (
    CountBody,
    Message,
    MessagesBody,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from api.schema import (
    ChatBody,
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    StreamOptions,
    Thinking,
    Tool,
)
from runtime.errors import RequestError

MIN_BUDGET_TOKENS = 1024
_BILLING_LINE = "x-anthropic-billing-header:"
"""Coding agents put a line with this name into the system text. It changes with every request and would make each
prompt a new one for the prefix cache."""
_REMINDER = "<system-reminder>\n{}\n</system-reminder>"
"""What the system says in the middle of a conversation stays there, in a user turn, as coding agents write it: moved to
the front it would make the whole prompt a new one for the prefix cache."""


def to_chat(body: CountBody) -> tuple[ChatBody, list[str]]:
    """The chat, and for each of its messages the part of the body that it came from.

    Raises RequestError naming the Anthropic field.
    """
    _check(body)
    placed = [("system", message) for message in _system(body.system)]
    for index, turn in enumerate(body.messages):
        placed += [(f"messages.{index}", message) for message in _turn(turn, index)]
    messages, places = [message for _, message in placed], [place for place, _ in placed]
    continues = body.messages[-1].role == "assistant"
    chat = ChatBody(
        model=body.model,
        messages=messages,
        tools=[_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools or ()] or None,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        thinking=None if body.thinking is None else Thinking(body.thinking.type),
        reasoning_effort=None if body.output_config is None else body.output_config.effort,
        response_format=_format(body),
        # The last turn, if it is the assistant's, is the beginning of the answer.
        continue_final_message=continues or None,
        add_generation_prompt=False if continues else None,
    )
    if not isinstance(body, MessagesBody):
        return chat, places
    chat = msgspec.structs.replace(
        chat,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        stream=body.stream,
        stream_options=StreamOptions() if body.stream else None,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        kv_transfer_params=body.kv_transfer_params,
    )
    return chat, places


def _check(body: CountBody) -> None:
    if not body.messages:
        raise RequestError("messages: at least one message is required", param="messages")
    for index, message in enumerate(body.messages):
        if message.content == []:
            where = f"messages.{index}.content"
            raise RequestError(f"{where}: must not be empty", param=where)
    if body.thread is not None:
        raise RequestError(
            "thread: not supported by this server; send the whole conversation",
            param="thread",
            code="thread_unsupported_request",
        )
    thinking = body.thinking
    if thinking is None or thinking.type != "enabled" or thinking.budget_tokens is None:
        return
    if thinking.budget_tokens < MIN_BUDGET_TOKENS:
        param = "thinking.budget_tokens"
        raise RequestError(f"{param}: must be at least {MIN_BUDGET_TOKENS}", param=param)


def _system(system: str | Sequence[TextBlock] | None) -> list[dict[str, Any]]:
    texts = [system] if isinstance(system, str) else [block.text for block in system or ()]
    kept = [text for text in map(_without_billing_line, texts) if text]
    return [{"role": "system", "content": "\n\n".join(kept)}] if kept else []


def _without_billing_line(text: str) -> str:
    if not text.startswith(_BILLING_LINE):
        return text
    return text.partition("\n")[2]


def _turn(message: Message, index: int) -> Iterator[dict[str, Any]]:
    """One Anthropic message as chat messages: each tool result is a message of its own."""
    blocks = [TextBlock(message.content)] if isinstance(message.content, str) else message.content
    if message.role == "assistant":
        yield _assistant(blocks, index)
        return
    texts: list[str] = []
    for place, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(_REMINDER.format(block.text) if message.role == "system" else block.text)
        elif isinstance(block, ToolResultBlock) and message.role == "user":
            if texts:
                yield {"role": "user", "content": "\n\n".join(texts)}
                texts = []
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result_text(block)}
        else:
            raise _misplaced(index, place)
    if texts:
        yield {"role": "user", "content": "\n\n".join(texts)}


def _assistant(blocks: Sequence[Any], index: int) -> dict[str, Any]:
    texts, reasoning, calls = [], [], []
    for place, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            reasoning.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append({"id": block.id, "function": {"name": block.name, "arguments": block.input}})
        elif isinstance(block, ToolResultBlock):
            raise _misplaced(index, place)
    return {
        "role": "assistant",
        "content": "\n\n".join(texts),
        "reasoning_content": "\n\n".join(reasoning),
        "tool_calls": calls,
    }


def _result_text(block: ToolResultBlock) -> str:
    if isinstance(block.content, str):
        return block.content
    return "\n\n".join(part.text for part in block.content or ())


def _misplaced(index: int, place: int) -> RequestError:
    where = f"messages.{index}.content.{place}"
    return RequestError(f"{where}: a block of this type has no place in a message of this role", param=where)


def _tool(name: str, description: str | None, schema: dict[str, Any]) -> Tool:
    return Tool("function", FunctionDefinition(name, description, schema))


def _tool_choice(choice: ToolChoice | None) -> str | NamedToolChoice | None:
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise RequestError("tool_choice.name: this field is required", param="tool_choice.name")
        return NamedToolChoice(NamedFunction(choice.name))
    return "required" if choice.type == "any" else choice.type


def _format(body: CountBody) -> ResponseFormat | None:
    if body.output_config is None or body.output_config.format is None:
        return None
    return ResponseFormat("json_schema", JsonSchemaFormat("output", body.output_config.format.schema))
