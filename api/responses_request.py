"""A Responses body as the chat it means: input items become messages."""

from collections.abc import Sequence
from typing import Any

from api.responses_schema import NamedFunctionChoice, ResponsesBody, TextFormat
from api.schema import (
    ChatBody,
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    StreamOptions,
    Tool,
)
from runtime.errors import RequestError

Messages = list[dict[str, Any]]


def to_chat(body: ResponsesBody, messages: Messages) -> ChatBody:
    """`messages`: the conversation, instructions first. Raises RequestError."""
    return ChatBody(
        model=body.model,
        messages=messages,
        stream=body.stream,
        stream_options=StreamOptions() if body.stream else None,
        max_completion_tokens=body.max_output_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        response_format=_format(None if body.text is None else body.text.format),
        tools=[
            Tool("function", FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict))
            for tool in body.tools or ()
        ]
        or None,
        tool_choice=_tool_choice(body.tool_choice, bool(body.tools)),
        parallel_tool_calls=body.parallel_tool_calls,
        priority=body.priority,
        chat_template_kwargs=body.chat_template_kwargs,
        kv_transfer_params=body.kv_transfer_params,
    )


def _format(asked: TextFormat | None) -> ResponseFormat | None:
    if asked is None:
        return None
    if asked.type != "json_schema":
        return ResponseFormat(asked.type)
    return ResponseFormat("json_schema", JsonSchemaFormat(asked.name or "output", asked.schema))


def _tool_choice(choice: str | NamedFunctionChoice | None, has_tools: bool) -> str | NamedToolChoice | None:
    if isinstance(choice, NamedFunctionChoice):
        return NamedToolChoice("function", NamedFunction(choice.name))
    # Clients send the default along even when there is nothing to choose.
    return None if choice == "auto" and not has_tools else choice


def input_messages(items: str | Sequence[dict[str, Any]]) -> Messages:
    """The messages of `input`. Raises RequestError naming the item."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not items:
        raise RequestError("input: must not be empty", param="input")
    messages: Messages = []
    for index, item in enumerate(items):
        _add_item(messages, item, f"input.{index}")
    return messages


def _add_item(messages: Messages, item: dict[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(messages, item, where)
    elif kind == "reasoning":
        _assistant_turn(messages)["reasoning_content"] += _reasoning_text(item, where)
    elif kind == "function_call":
        call = {"id": item.get("call_id") or item.get("id"),
                "function": {"name": item.get("name"), "arguments": item.get("arguments")}}  # fmt: skip
        _assistant_turn(messages)["tool_calls"].append(call)
    elif kind == "function_call_output":
        output = item.get("output")
        if not isinstance(output, str | list):
            raise RequestError(f"{where}.output: must be a string or a list of text parts", param=f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    else:
        raise RequestError(f"{where}.type: items of this type are not supported", param=f"{where}.type")


def _add_message(messages: Messages, item: dict[str, Any], where: str) -> None:
    if item.get("role") != "assistant":
        messages.append({"role": item.get("role"), "content": item.get("content")})
        return
    content = item.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if content is None:
        raise RequestError(f"{where}.content: must be a string or a list of text parts", param=f"{where}.content")
    _assistant_turn(messages)["content"] += parts


def _assistant_turn(messages: Messages) -> dict[str, Any]:
    """The open turn of the assistant: its reasoning, text and calls come as items of their own."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": [], "reasoning_content": "", "tool_calls": []})
    return messages[-1]


def _reasoning_text(item: dict[str, Any], where: str) -> str:
    """The text of a reasoning item; one that only has a summary or encrypted content says nothing to this model."""
    content = item.get("content") or []
    if not isinstance(content, list):
        raise RequestError(f"{where}.content: must be a list", param=f"{where}.content")
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n\n".join(text for text in texts if isinstance(text, str))
