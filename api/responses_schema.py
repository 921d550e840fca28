"""The body of POST /v1/responses as a typed request."""

from typing import Any, Literal

import msgspec

from api.schema import KvTransferParams

SEALED_REASONING = "reasoning.encrypted_content"
"""The member of `include` that asks for reasoning in a form that can be sent back without the text."""
LOGPROBS = "message.output_text.logprobs"
"""The member of `include` that asks for the log-probabilities of the text."""


class ReasoningConfig(msgspec.Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None


class TextFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesTool(msgspec.Struct, frozen=True):
    """A function or a custom tool of the caller, a namespace of such, or something that only OpenAI's servers run."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None
    """Custom tools: what the input looks like."""
    tools: "list[ResponsesTool] | None" = None
    """Of a namespace."""


class ToolChoiceObject(msgspec.Struct, frozen=True):
    """A choice that is more than a word: one tool, or a mode for some of the tools."""

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list["AllowedTool"] | None = None


class AllowedTool(msgspec.Struct, frozen=True):
    """One of the tools; those that only OpenAI's servers run have no name and are passed over."""

    type: str = "function"
    name: str = ""
    namespace: str | None = None


class InputBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses/input_tokens, and what it shares with /v1/responses: all that shapes the prompt."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    previous_items: list[dict[str, Any]] | None = None
    """The conversation up to `previous_response_id`, from a router that asked the node that keeps it."""
    referenced_items: list[dict[str, Any]] | None = None
    """What `item_reference` items mean, from the same router."""
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: str | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    conversation: Any = None
    """Refused: conversations are kept by OpenAI's servers."""
    prompt: Any = None
    """Refused for the same reason."""


class ResponsesBody(InputBody, frozen=True, kw_only=True):
    """POST /v1/responses."""

    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    min_tokens: int | None = None
    top_logprobs: int | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    priority: int | None = None
    thinking_token_budget: int | None = None
    kv_transfer_params: KvTransferParams | None = None
