"""The bodies of /v1/chat/completions and /v1/completions as typed requests: shapes only, ranges are in `sampling`.

Fields that clients send and this server has no use for (`user`, `metadata`, `store`, ...) are not listed: unknown
fields are ignored.
"""

from typing import Any, Literal

import msgspec


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema", "structural_tag", "regex"]
    json_schema: JsonSchemaFormat | None = None
    regex: str | None = None
    format: Any = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct, frozen=True):
    """Exactly one of these is given."""

    json: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None


class Resume(msgspec.Struct, frozen=True):
    """A stream that broke on another node and goes on here (`api.resume`)."""

    token_ids: list[int]
    """Everything generated whose text the client has."""
    created: int | None = None
    """The time that its chunks carry."""


class KvTransferParams(msgspec.Struct, frozen=True):
    """What a router adds to the two legs of one request."""

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    transfer_id: str | None = None
    min_tokens: int | None = None
    """Prefill leg: the caller's own `min_tokens`, which the body no longer shows."""
    remote_address: str | None = None
    remote_epoch: str | None = None
    remote_bootstrap_addr: str | None = None
    remote_engine_id: str | None = None
    prompt_token_ids: list[int] | None = None
    resume: Resume | None = None


class SamplingBody(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints share. None: not given."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    thinking_token_budget: int | None = None
    kv_transfer_params: KvTransferParams | None = None


class FunctionDefinition(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct, frozen=True):
    name: str


class NamedToolChoice(msgspec.Struct, frozen=True, tag="function", tag_field="type"):
    function: NamedFunction


class AllowedTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(msgspec.Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: list[AllowedTool]


class AllowedToolsChoice(msgspec.Struct, frozen=True, tag="allowed_tools", tag_field="type"):
    """Some of the tools: the model is shown only these."""

    allowed_tools: AllowedTools


class Thinking(msgspec.Struct, frozen=True):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    return_prompt_text: bool | None = None


class CompletionBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
