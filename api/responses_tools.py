"""The tools of a Responses request as the functions that the model knows, and the way back from its calls.

A custom tool takes free text: to the model it is a function of one string, `input`. A tool in a namespace is a function
whose name begins with that of the namespace.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from api.responses_schema import ResponsesTool
from api.schema import FunctionDefinition, Tool
from runtime.errors import RequestError

HOSTED_TOOLS: Final = frozenset(
    ("code_interpreter", "computer", "computer_use_preview", "file_search", "image_generation", "local_shell", "mcp",
     "shell", "tool_search", "web_search", "web_search_2025_08_26", "web_search_preview",
     "web_search_preview_2025_03_11")
)  # fmt: skip
"""Tools that OpenAI's servers or clients know how to run. This model does not, so it is not shown them."""
INPUT: Final = "input"
_FREE_TEXT: Final = {
    "type": "object",
    "properties": {INPUT: {"type": "string", "description": "The whole input of the tool, as free text."}},
    "required": [INPUT],
    "additionalProperties": False,
}


class Called(msgspec.Struct, frozen=True):
    """A tool as its caller knows it."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


def function_name(name: str, namespace: object = None) -> str:
    """The name under which the model knows a tool."""
    return f"{namespace}__{name}" if isinstance(namespace, str) and namespace else name


class ToolTable:
    """The tools of one request. Raises RequestError for a tool that cannot be offered."""

    def __init__(self, tools: Sequence[ResponsesTool]) -> None:
        self.functions: list[Tool] = []
        self.given: list[dict[str, Any]] = []
        """What the response repeats."""
        self.left_out = sorted({tool.type for tool in tools if tool.type in HOSTED_TOOLS})
        """Types of tools that the model is not shown."""
        self._called: dict[str, Called] = {}
        for index, tool in enumerate(tools):
            if tool.type in HOSTED_TOOLS:
                continue
            self.functions += self._add(tool, f"tools.{index}", None)
            self.given.append(_as_given(tool))

    def called(self, function: str) -> Called:
        """The tool that the model called by this name, which may be none of those offered."""
        return self._called.get(function) or Called(function)

    def _add(self, tool: ResponsesTool, where: str, namespace: str | None) -> Iterator[Tool]:
        if not tool.name:
            raise RequestError(f"{where}.name: this field is required", param=f"{where}.name")
        if tool.type == "namespace" and namespace is None:
            for index, inner in enumerate(tool.tools or ()):
                yield from self._add(inner, f"{where}.tools.{index}", tool.name)
            return
        if tool.type not in ("function", "custom"):
            raise RequestError(f"{where}.type: tools of this type are not supported", param=f"{where}.type")
        name = function_name(tool.name, namespace)
        self._called[name] = Called(tool.name, namespace, tool.type == "custom")
        if tool.type == "function":
            yield Tool("function", FunctionDefinition(name, tool.description, tool.parameters, tool.strict))
        else:
            yield Tool("function", FunctionDefinition(name, _described(tool), _FREE_TEXT))


def _described(tool: ResponsesTool) -> str | None:
    """A custom tool's description, with the grammar that its input keeps to: the model is told, not bound."""
    definition = (tool.format or {}).get("definition")
    if not isinstance(definition, str):
        return tool.description
    syntax = (tool.format or {}).get("syntax")
    return f"{tool.description or ''}\n\nThe input follows this grammar ({syntax}):\n{definition}".lstrip()


def _as_given(tool: ResponsesTool) -> dict[str, Any]:
    given: dict[str, Any] = msgspec.to_builtins(tool)
    if tool.type == "function":
        return {key: given[key] for key in ("type", "name", "description", "parameters", "strict")}
    return {key: value for key, value in given.items() if value is not None}
