"""The output items of a response, as they grow, and the events that build them."""

from collections.abc import Iterator
from typing import Any

import orjson

from api.chat_format import new_call_id
from api.parse_events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallStart
from api.responses_tools import INPUT, ToolTable
from api.sealed_reasoning import seal

_CALLS = ("function_call", "custom_tool_call")


class ResponsesItems:
    """The items of one response, of which one is open at a time."""

    def __init__(self, response_id: str, tools: ToolTable, *, seals: bool = False) -> None:
        """`seals`: reasoning items come with their text sealed, too."""
        self._id = response_id.partition("_")[2] or response_id
        self._tools = tools
        self._seals = seals
        self.items: list[dict[str, Any]] = []
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._is_open = False

    def add(self, event: Event, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """`logprobs` are those of the event's text."""
        if isinstance(event, ReasoningDelta):
            yield from self._open("reasoning")
            yield from self._grow("response.reasoning_text.delta", event.text)
        elif isinstance(event, ContentDelta):
            yield from self._open("message")
            self._logprobs += logprobs
            yield from self._grow("response.output_text.delta", event.text, logprobs=logprobs)
        elif isinstance(event, ToolCallStart):
            yield from self.close("commentary")
            yield from self._open_call(event.name)
        elif isinstance(event, ToolArgumentsDelta):
            self._text.append(event.text)
            if self.items[-1]["type"] == "function_call":
                yield self._event("response.function_call_arguments.delta", delta=event.text)

    def _open(self, kind: str) -> Iterator[dict[str, Any]]:
        if self._is_open and self.items[-1]["type"] == kind:
            return
        yield from self.close()
        number = len(self.items)
        if kind == "reasoning":
            item = {"type": kind, "id": f"rs_{self._id}_{number}", "status": "in_progress", "content": [],
                    "summary": [], "encrypted_content": f"{self._id}-{number}"}  # fmt: skip
        else:
            item = {"type": kind, "id": f"msg_{self._id}_{number}", "status": "in_progress", "role": "assistant",
                    "phase": "final_answer", "content": []}  # fmt: skip
        yield self._begin(item)
        yield self._event("response.content_part.added", content_index=0, part=self._part())

    def _open_call(self, function: str) -> Iterator[dict[str, Any]]:
        called, number = self._tools.called(function), len(self.items)
        kind, prefix, value = ("custom_tool_call", "ctc", "input") if called.is_custom else (
            "function_call", "fc", "arguments")  # fmt: skip
        item = {"type": kind, "id": f"{prefix}_{self._id}_{number}", "status": "in_progress", "call_id": new_call_id(),
                "name": called.name, value: ""}  # fmt: skip
        if called.namespace is not None:
            item["namespace"] = called.namespace
        yield self._begin(item)

    def _begin(self, item: dict[str, Any]) -> dict[str, Any]:
        self._is_open = True
        self._text, self._logprobs = [], []
        self.items.append(item)
        return {"type": "response.output_item.added", "item": dict(item), "output_index": len(self.items) - 1}

    def _grow(self, kind: str, text: str, **more: Any) -> Iterator[dict[str, Any]]:
        self._text.append(text)
        yield self._event(kind, content_index=0, delta=text, **more)

    def _part(self) -> dict[str, Any]:
        text = "".join(self._text)
        if self.items[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": list(self._logprobs), "text": text}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def close(self, phase: str = "final_answer", status: str = "completed") -> Iterator[dict[str, Any]]:
        """Complete the open item, if one is."""
        if not self._is_open:
            return
        self._is_open = False
        item, text = self.items[-1], "".join(self._text)
        item["status"] = status
        if item["type"] in _CALLS:
            yield from self._close_call(item, text)
        else:
            part = self._part()
            item["content"] = [part]
            if item["type"] == "message":
                item["phase"] = phase
                yield self._event("response.output_text.done", content_index=0, text=text, logprobs=part["logprobs"])
            else:
                if self._seals:
                    item["encrypted_content"] = seal(text)
                yield self._event("response.reasoning_text.done", content_index=0, text=text)
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield {"type": "response.output_item.done", "item": item, "output_index": len(self.items) - 1}

    def _close_call(self, item: dict[str, Any], arguments: str) -> Iterator[dict[str, Any]]:
        if item["type"] == "function_call":
            item["arguments"] = arguments
            yield self._event("response.function_call_arguments.done", arguments=arguments)
            return
        # The text of a custom tool is one JSON string among the arguments: whole only now.
        item["input"] = _free_text(arguments)
        if item["input"]:
            yield self._event("response.custom_tool_call_input.delta", delta=item["input"])
        yield self._event("response.custom_tool_call_input.done", input=item["input"])


def _free_text(arguments: str) -> str:
    """The input of a custom tool; empty for a call that was cut short."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return ""
    text = value.get(INPUT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else ""
