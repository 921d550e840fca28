"""What the output parser is told at the start and what it reports. All types are frozen."""

import enum

import msgspec


class StartState(enum.Enum):
    """Where the model's output begins, which follows from how the prompt ended."""

    REASONING = "reasoning"
    CONTENT = "content"
    TOOL = "tool"
    """Inside a block of tool calls that the prompt opened."""


class ParserStart(msgspec.Struct, frozen=True):
    """`continuation`: the prompt ended inside a text, so the output's first newlines belong to it."""

    state: StartState
    continuation: bool = False


class ReasoningDelta(msgspec.Struct, frozen=True, tag=True, gc=False):
    text: str


class ContentDelta(msgspec.Struct, frozen=True, tag=True, gc=False):
    text: str


class ToolCallStart(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Call number `index` of this output, from 0. Its arguments follow as deltas of one JSON text."""

    index: int
    name: str


class ToolArgumentsDelta(msgspec.Struct, frozen=True, tag=True, gc=False):
    index: int
    text: str


class ToolCallEnd(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The arguments of this call are a complete JSON object. Missing for a call that was cut by length."""

    index: int


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolArgumentsDelta | ToolCallEnd
