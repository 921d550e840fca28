"""A chat, as typed values -> the prompt, and where the parser of its output starts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from api.chat_messages import check_tool_results
from api.chat_mode import Mode
from api.encoding import markers
from api.encoding.blocks import CALLS_OPEN
from api.encoding.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage
from api.encoding.render import is_inside_reasoning, render
from api.encoding.segments import PromptBuilder, Segments, prompt_text
from api.parse_events import ParserStart, StartState
from runtime.errors import RequestError

_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]+")
MAX_TOOL_NAME_CHARS = 256


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function the model may call; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = {}
    strict: bool = False

    @property
    def function(self) -> dict[str, Any]:
        """What the prompt shows: always these three keys in this order."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


class NamedTool(msgspec.Struct, frozen=True):
    """`tool_choice`: this tool must be called."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """All of a request that shapes its prompt.

    `format_text` is the response-format block (`encoding.blocks`). `continue_final` goes on with the last message,
    which must be the assistant's; `generation=False` ends the prompt after the last message instead of opening an
    answer. `drop_reasoning=False` keeps the reasoning of settled turns, as tools do by themselves.
    """

    messages: tuple[Message, ...]
    mode: Mode
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    format_text: str = ""
    continue_final: bool = False
    generation: bool = True
    drop_reasoning: bool = True


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt to tokenise, and all that the parser of the output must know."""

    segments: Segments
    start: ParserStart
    mode: Mode
    tools: tuple[Tool, ...]
    """The tools the model was shown; without any, tool markup in the output is plain content."""
    must_call: bool
    """Whether the request demands a tool call, to be enforced by a grammar."""
    one_call: bool = False
    """The request names the one tool to call, which means a single call."""
    answer_prefix: str = ""
    """The beginning of the answer, where the prompt holds one to continue."""

    @property
    def text(self) -> str:
        return prompt_text(self.segments)


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Refuse tools that cannot be offered, and a choice that does not fit them. Raises RequestError."""
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools.{index}.function.name"
        if not _TOOL_NAME.fullmatch(tool.name) or len(tool.name) > MAX_TOOL_NAME_CHARS:
            raise RequestError(
                f"{where}: must be 1 to {MAX_TOOL_NAME_CHARS} characters out of a-z, A-Z, 0-9, _ and -", param=where
            )
        if tool.name in seen:
            raise RequestError(f"{where}: two tools have this name", param=where)
        seen.add(tool.name)
    if isinstance(choice, NamedTool) and choice.name not in seen:
        raise RequestError("tool_choice: names a function that is not among the tools", param="tool_choice")
    if choice == "required" and not tools:
        raise RequestError("tool_choice: a call cannot be required without tools", param="tool_choice")


def render_chat(request: ChatRequest) -> RenderedPrompt:
    """Build the prompt of a request. Raises RequestError naming the field."""
    check_tools(request.tools, request.tool_choice)
    check_tool_results(request.messages)
    tools = _visible_tools(request)
    messages = _with_leading_system(request, tools)
    if request.continue_final:
        messages = _continued(messages)
    segments = render(
        messages,
        thinking=request.mode.thinking,
        effort_text=request.mode.effort_text,
        drop_reasoning=request.drop_reasoning,
        generation=request.generation,
    )
    start = _parser_start(messages, thinking=request.mode.thinking)
    must_call = bool(tools) and (request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool))
    if must_call and request.generation and _opens_answer(messages) and not request.mode.thinking:
        # Without thinking the prompt itself can open the block, which is also how the model was trained.
        builder = PromptBuilder()
        builder.template(CALLS_OPEN)
        segments, start = (*segments, *builder.build()), ParserStart(StartState.TOOL)
    return RenderedPrompt(
        segments=segments,
        start=start,
        mode=request.mode,
        tools=tools,
        must_call=must_call,
        one_call=isinstance(request.tool_choice, NamedTool),
        answer_prefix=messages[-1].content if start.continuation and start.state is StartState.CONTENT else "",
    )


def render_fim(prompt: str, suffix: str) -> Segments:
    """The fill-in-the-middle prompt of a text completion with a suffix."""
    builder = PromptBuilder()
    for marker, text in ((markers.FIM_BEGIN, prompt), (markers.FIM_HOLE, suffix)):
        builder.marker(marker)
        builder.text(text)
    builder.marker(markers.FIM_END)
    return builder.build()


def _visible_tools(request: ChatRequest) -> tuple[Tool, ...]:
    if request.tool_choice == "none":
        return ()
    if isinstance(request.tool_choice, NamedTool):
        return tuple(tool for tool in request.tools if tool.name == request.tool_choice.name)
    return request.tools


def _with_leading_system(request: ChatRequest, tools: Sequence[Tool]) -> tuple[Message, ...]:
    """Join all system texts at the front, with the tools and the response format."""
    systems = [message for message in request.messages if isinstance(message, SystemMessage)]
    others = tuple(message for message in request.messages if not isinstance(message, SystemMessage))
    if not (systems or tools or request.format_text):
        return others
    system = SystemMessage(
        content="\n\n".join(message.content for message in systems if message.content),
        tools=tuple(tool.function for tool in tools),
        format_text=request.format_text,
    )
    return (system, *others)


def _continued(messages: Sequence[Message]) -> tuple[Message, ...]:
    last = messages[-1] if messages else None
    if not isinstance(last, AssistantMessage):
        where = "continue_final_message"
        raise RequestError(f"{where}: the last message must be the assistant's", param=where)
    return (*messages[:-1], msgspec.structs.replace(last, continued=True))


def _parser_start(messages: Sequence[Message], *, thinking: bool) -> ParserStart:
    last = messages[-1] if messages else None
    if isinstance(last, AssistantMessage) and last.continued:
        if not is_inside_reasoning(last):
            return ParserStart(StartState.CONTENT, continuation=True)
        if thinking:
            return ParserStart(StartState.REASONING, continuation=bool(last.reasoning))
    return ParserStart(StartState.REASONING if thinking and _final_task(messages) is None else StartState.CONTENT)


def _opens_answer(messages: Sequence[Message]) -> bool:
    """Whether the prompt ends with a fresh answer of the assistant."""
    last = messages[-1] if messages else None
    return not (isinstance(last, AssistantMessage) and last.continued) and _final_task(messages) is None


def _final_task(messages: Sequence[Message]) -> str | None:
    """The task that the last turn asks for; its answer has no reasoning."""
    for message in reversed(messages):
        if not isinstance(message, ToolMessage):
            return message.task if isinstance(message, UserMessage | AssistantMessage) else None
    return None
