"""The text blocks inside turns: tool schemas, response format, tool calls and tool results."""

import json
from collections.abc import Iterable, Mapping
from typing import Final

from api.encoding.markers import DSML, split_template
from api.encoding.messages import Json, ToolCall
from api.encoding.segments import PromptBuilder
from runtime.errors import RequestError

_TOOLS_BEFORE: Final = split_template(
    f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
)
_TOOLS_AFTER: Final = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)

JSON_OBJECT_TEXT: Final = (
    "You are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY."
)
"""The response-format block of `json_object`."""

CALLS_OPEN: Final = split_template(f"\n\n<{DSML}tool_calls>\n")
"""What opens a block of tool calls; appended to the prompt when a call is forced without thinking."""
_CALLS_CLOSE: Final = split_template(f"</{DSML}tool_calls>")
_INVOKE_OPEN: Final = split_template(f'<{DSML}invoke name="')
_INVOKE_CLOSE: Final = split_template(f"</{DSML}invoke>\n")
_PARAMETER_OPEN: Final = split_template(f'<{DSML}parameter name="')
_PARAMETER_CLOSE: Final = split_template(f"</{DSML}parameter>")


def to_json(value: Json) -> str:
    """JSON the way the model saw it in training: `", "` and `": "`, key order kept, nothing ASCII-escaped."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise RequestError("a schema or an argument is nested too deeply") from None


def schema_format_text(schema: Json) -> str:
    """The response-format block of a JSON schema."""
    return f"## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{to_json(schema)}"


def append_tools(prompt: PromptBuilder, functions: Iterable[Mapping[str, Json]]) -> None:
    """The tools block, with one `function` object per line, keys as given."""
    prompt.template(_TOOLS_BEFORE)
    prompt.text("\n".join(to_json(function) for function in functions))
    prompt.text(_TOOLS_AFTER)


def append_tool_calls(prompt: PromptBuilder, calls: Iterable[ToolCall]) -> None:
    prompt.template(CALLS_OPEN)
    for call in calls:
        prompt.template(_INVOKE_OPEN)
        prompt.text(f'{call.name}">\n')
        arguments = call_arguments(call)
        if not arguments:
            prompt.text("\n")  # the checkpoint's encoder joins no parameters with the newline that follows them
        for key, value in arguments.items():
            is_string = isinstance(value, str)
            prompt.template(_PARAMETER_OPEN)
            prompt.text(f'{key}" string="{"true" if is_string else "false"}">')
            prompt.text(value if is_string else to_json(value))
            prompt.template(_PARAMETER_CLOSE)
            prompt.text("\n")
        prompt.template(_INVOKE_CLOSE)
    prompt.template(_CALLS_CLOSE)


def call_arguments(call: ToolCall) -> Mapping[str, Json]:
    """A call's arguments by name. What is not a JSON object becomes one string named `arguments`, never an error."""
    if not isinstance(call.arguments, str):
        return call.arguments
    try:
        value = json.loads(call.arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": call.arguments}


def tool_result(content: str) -> str:
    return f"<tool_result>{content}</tool_result>"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
