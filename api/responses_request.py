"""A Responses body as the chat it means: input items become messages."""

from typing import Any

import msgspec

from api.chat_messages import content_text, parse_message
from api.response_store import Items
from api.responses_schema import LOGPROBS, InputBody, ResponsesBody, TextFormat, ToolChoiceObject
from api.responses_tools import INPUT, ToolTable, function_name
from api.schema import (
    AllowedTool,
    AllowedTools,
    AllowedToolsChoice,
    ChatBody,
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    StreamOptions,
)
from api.sealed_reasoning import unseal
from runtime.errors import RequestError

HOSTED_CALLS = frozenset(
    ("code_interpreter_call", "file_search_call", "image_generation_call", "mcp_list_tools", "web_search_call")
)
"""What such tools left in a conversation. It says nothing to this model."""


class Conversation:
    """Chat messages made of items. `places[k]` says which part of the request message k came from."""

    def __init__(self, instructions: str | None, earlier: Items, items: Items) -> None:
        """`earlier` items were checked when they were new. Raises RequestError naming the item of `items`."""
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        if instructions:
            self._add({"role": "system", "content": instructions}, "instructions")
        for name, part in (("previous_response_id", earlier), ("input", items)):
            for index, item in enumerate(part):
                self._add_item(item, f"{name}.{index}")

    def _add(self, message: dict[str, Any], place: str) -> None:
        self.messages.append(message)
        self.places.append(place)

    def _add_item(self, item: dict[str, Any], where: str) -> None:
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant":
            content = item.get("content")
            self._turn(where)["content"].append({"type": "text", "text": content_text(content, f"{where}.content")})
        elif kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            parse_message(message, where)
            self._add(message, where)
        elif kind == "reasoning":
            self._turn(where)["reasoning_content"] += _reasoning_text(item, where)
        elif kind in ("function_call", "custom_tool_call"):
            self._turn(where)["tool_calls"].append(_tool_call(item, where))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = content_text(item.get("output"), f"{where}.output")
            self._add({"role": "tool", "tool_call_id": item.get("call_id"), "content": output}, where)
        elif not isinstance(kind, str) or kind not in HOSTED_CALLS:
            raise RequestError(f"{where}.type: items of this type are not supported", param=f"{where}.type")

    def _turn(self, where: str) -> dict[str, Any]:
        """The open turn of the assistant: its reasoning, text and calls come as items of their own."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._add({"role": "assistant", "content": [], "reasoning_content": "", "tool_calls": []}, where)
        return self.messages[-1]


def _tool_call(item: dict[str, Any], where: str) -> dict[str, Any]:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name: must be a non-empty string", param=f"{where}.name")
    is_custom = item["type"] == "custom_tool_call"
    field = "input" if is_custom else "arguments"
    given = item.get(field)
    if not isinstance(given, str) and (is_custom or not isinstance(given, dict)):
        raise RequestError(f"{where}.{field}: must be a string", param=f"{where}.{field}")
    function = {"name": function_name(name, item.get("namespace")), "arguments": {INPUT: given} if is_custom else given}
    return {"id": item.get("call_id") or item.get("id"), "function": function}


def _reasoning_text(item: dict[str, Any], where: str) -> str:
    """The text of a reasoning item; one that has only a summary says nothing to this model."""
    content = item.get("content") or []
    if not isinstance(content, list):
        raise RequestError(f"{where}.content: must be a list", param=f"{where}.content")
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n\n".join(text for text in texts if isinstance(text, str)) or unseal(item.get("encrypted_content"))


def input_items(given: str | Items) -> Items:
    """`input` as items. Raises RequestError when there are none."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not given:
        raise RequestError("input: must not be empty", param="input")
    return given


def to_chat(body: InputBody, messages: list[dict[str, Any]], table: ToolTable) -> ChatBody:
    """Raises RequestError naming the field."""
    for field in ("conversation", "prompt"):
        if getattr(body, field) is not None:
            raise RequestError(f"{field}: not supported by this server; send the items themselves", param=field)
    chat = ChatBody(
        model=body.model,
        messages=messages,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        response_format=_format(None if body.text is None else body.text.format),
        tools=table.functions or None,
        tool_choice=_tool_choice(body, table),
        parallel_tool_calls=body.parallel_tool_calls,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    if not isinstance(body, ResponsesBody):
        return chat
    if body.background:
        raise RequestError("background: not supported by this server", param="background")
    wants_logprobs = LOGPROBS in (body.include or ())
    return msgspec.structs.replace(
        chat,
        stream=body.stream,
        stream_options=StreamOptions() if body.stream else None,
        max_completion_tokens=body.max_output_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        logprobs=wants_logprobs or None,
        top_logprobs=body.top_logprobs if wants_logprobs else None,
        thinking_token_budget=body.thinking_token_budget,
        priority=body.priority,
        kv_transfer_params=body.kv_transfer_params,
    )


def _tool_choice(body: InputBody, table: ToolTable) -> str | NamedToolChoice | AllowedToolsChoice | None:
    choice = body.tool_choice
    if not isinstance(choice, ToolChoiceObject):
        # Clients send the default along even when there is nothing to choose.
        return None if choice == "auto" and not table.functions else choice
    if choice.type in ("function", "custom"):
        if not choice.name:
            raise RequestError("tool_choice.name: this field is required", param="tool_choice.name")
        return NamedToolChoice(NamedFunction(function_name(choice.name, choice.namespace)))
    if choice.type != "allowed_tools":
        raise RequestError("tool_choice.type: must be function, custom or allowed_tools", param="tool_choice.type")
    names = [function_name(tool.name, tool.namespace) for tool in choice.tools or () if tool.name]
    allowed = [AllowedTool("function", NamedFunction(name)) for name in names]
    return AllowedToolsChoice(AllowedTools(choice.mode or "auto", allowed))


def _format(asked: TextFormat | None) -> ResponseFormat | None:
    if asked is None:
        return None
    if asked.type != "json_schema":
        return ResponseFormat(asked.type)
    if asked.name is None:
        raise RequestError("text.format.name: this field is required", param="text.format.name")
    return ResponseFormat("json_schema", JsonSchemaFormat(asked.name, asked.schema))
