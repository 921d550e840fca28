"""A chat request, whichever API it came through: checked, rendered, encoded, ready to be generated."""

from typing import Any, Literal

import msgspec
from aiohttp import web

from api.chat import ChatRequest, NamedTool, RenderedPrompt, Tool, ToolChoice, render_chat
from api.chat_messages import parse_messages
from api.chat_mode import Mode, resolve_mode, template_switch
from api.chat_output import ChatOutput
from api.constraints import chat_constraint, check_formats, format_text_of
from api.context import CONTEXT, Context
from api.handoff import Leg, first_token_body, leg_of
from api.prompts import encode_rendered
from api.sampling import LogprobsWanted, check, check_logprobs, check_max_tokens, stop_strings
from api.schema import AllowedToolsChoice, ChatBody, NamedToolChoice
from api.submission import Submission, build_submission, truncated
from api.text_output import TextRules
from runtime.errors import RequestError

WARNING_HEADER = "X-Tandem-Warning"
"""Says what was done otherwise than the caller may have expected."""
_TOOL_CHOICES: tuple[Literal["none", "auto", "required"], ...] = ("none", "auto", "required")


class PreparedChat(msgspec.Struct, frozen=True, kw_only=True):
    """All that generating and answering need."""

    body: ChatBody
    """As the engine sees it: the prefill leg of a disaggregated request asks for one token."""
    model: str
    rendered: RenderedPrompt
    submission: Submission
    leg: Leg
    headers: dict[str, str]
    """For the response."""


async def prepare_chat(request: web.Request, body: ChatBody, *, response_id: str) -> PreparedChat:
    """Check everything, then render and encode. Raises RequestError."""
    context = request.app[CONTEXT]
    model = context.model_of(body.model)
    leg = leg_of(body.kv_transfer_params, context.info)
    if leg.kind == "prefill":
        body = first_token_body(body)
    check_chat(body, context)
    rendered = render(body, context)
    headers = think_max_warning(rendered.mode, context)
    constraint = await chat_constraint(context, body, rendered)
    ids = await encode_rendered(context, rendered, body)
    max_tokens_param, max_tokens = asked_tokens(body)
    submission = await build_submission(
        context,
        body,
        response_id=response_id,
        prompts=[truncated(ids, body, context.info.max_model_len)],
        prompt_param="messages",
        leg=leg,
        wanted=LogprobsWanted(sample=num_logprobs(body), prompt=body.prompt_logprobs),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        default_max_tokens=context.settings.default_max_tokens,
        constraint=constraint,
    )
    return PreparedChat(body=body, model=model, rendered=rendered, submission=submission, leg=leg, headers=headers)


def asked_tokens(body: ChatBody) -> tuple[str, int | None]:
    """The bound on generated tokens and the name it came under; the newer name wins."""
    if body.max_completion_tokens is not None:
        return "max_completion_tokens", body.max_completion_tokens
    return "max_tokens", body.max_tokens


def num_logprobs(body: ChatBody) -> int | None:
    return (body.top_logprobs or 0) if body.logprobs else None


def check_chat(body: ChatBody, context: Context) -> None:
    """Refuse what is out of range, before anything is rendered."""
    check(body, context.limits)
    param, max_tokens = asked_tokens(body)
    check_max_tokens(max_tokens, param, body.min_tokens)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs: needs logprobs=true", param="top_logprobs")
    check_logprobs(body.top_logprobs, "top_logprobs", context.limits)
    check_logprobs(body.prompt_logprobs, "prompt_logprobs", context.limits)
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message: excludes add_generation_prompt=true", param="continue_final_message"
        )
    if body.tools is not None and not body.tools:
        raise RequestError("tools: must not be empty", param="tools")
    if body.tool_choice not in (None, "none") and not body.tools:
        raise RequestError("tool_choice: needs tools", param="tool_choice")
    check_formats(body)


def render(body: ChatBody, context: Context) -> RenderedPrompt:
    """The prompt of a checked request."""
    mode = resolve_mode(
        profile=context.effort_profile,
        default_thinking=context.settings.default_thinking,
        reasoning_effort=body.reasoning_effort,
        thinking=body.thinking.type if body.thinking is not None else None,
        template_kwargs=body.chat_template_kwargs,
    )
    tools, choice = _offered(body)
    return render_chat(
        ChatRequest(
            messages=parse_messages(body.messages),
            mode=mode,
            tools=tools,
            tool_choice=choice,
            format_text=format_text_of(body.response_format),
            continue_final=bool(body.continue_final_message),
            generation=body.add_generation_prompt is not False,
            drop_reasoning=template_switch(body.chat_template_kwargs or {}, "drop_thinking") is not False,
        )
    )


def _tool(function: Any) -> Tool:
    return Tool(
        name=function.name,
        description=function.description or "",
        parameters=function.parameters or {},
        strict=bool(function.strict),
    )


def _offered(body: ChatBody) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that may be called, and whether one must be."""
    tools = tuple(_tool(tool.function) for tool in body.tools or ())
    if not isinstance(body.tool_choice, AllowedToolsChoice):
        return tools, _tool_choice(body.tool_choice)
    allowed = body.tool_choice.allowed_tools
    names = {tool.function.name for tool in allowed.tools}
    if not names or not names <= {tool.name for tool in tools}:
        raise RequestError("tool_choice: names a function that is not among the tools, or none", param="tool_choice")
    return tuple(tool for tool in tools if tool.name in names), allowed.mode


def _tool_choice(choice: str | NamedToolChoice | None) -> ToolChoice:
    if isinstance(choice, NamedToolChoice):
        return NamedTool(choice.function.name)
    if choice is None:
        return "auto"
    for known in _TOOL_CHOICES:
        if choice == known:
            return known
    raise RequestError("tool_choice: must be none, auto, required, or name a function", param="tool_choice")


def chat_outputs(context: Context, prepared: PreparedChat) -> list[ChatOutput]:
    """One per choice, in the state in which the prompt ended."""
    rendered, rules = prepared.rendered, text_rules(prepared.body)
    hide = prepared.body.include_reasoning is False
    tools = bool(rendered.tools)
    return [
        ChatOutput(context.tokenizer, rules, rendered.start, tools=tools, hide_reasoning=hide)
        for _ in prepared.submission.submits
    ]


def text_rules(body: ChatBody) -> TextRules:
    """How a chat's tokens become text."""
    return TextRules(
        stops=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
    )


def think_max_warning(mode: Mode, context: Context) -> dict[str, str]:
    """The header that says Think Max has less context than it asks for; an error where the settings refuse that."""
    needed, has = context.settings.think_max_context, context.info.max_model_len
    if not mode.is_think_max or has >= needed:
        return {}
    message = f"Think Max asks for a context of at least {needed} tokens, this server has {has}"
    if context.settings.think_max_policy == "refuse":
        raise RequestError(f"reasoning_effort: {message}", param="reasoning_effort")
    return {WARNING_HEADER: message}
