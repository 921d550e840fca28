"""POST /v1/chat/completions."""

from typing import Any, Literal

from aiohttp import web

from api.body import decode
from api.chat import ChatRequest, NamedTool, RenderedPrompt, Tool, ToolChoice, render_chat
from api.chat_format import ChatResponse, ChatShape
from api.chat_messages import parse_messages
from api.chat_mode import Mode, resolve_mode
from api.chat_output import ChatOutput
from api.constraints import chat_constraint, check_formats, format_text_of
from api.context import CONTEXT, REQUEST_ID, Context
from api.handoff import first_token_body, leg_of
from api.logprobs import TokenNames
from api.prompts import encode_rendered
from api.respond import now, respond
from api.sampling import LogprobsWanted, check, check_logprobs, check_max_tokens, stop_strings
from api.schema import ChatBody, NamedToolChoice
from api.submission import build_submission, response_id, truncated
from api.text_output import TextRules
from runtime.errors import RequestError

_TOOL_CHOICES: tuple[Literal["none", "auto", "required"], ...] = ("none", "auto", "required")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    context = request.app[CONTEXT]
    arrived = now()
    body = decode(await request.read(), ChatBody)
    with context.limiter.slot():
        return await answer(request, body, arrived)


async def answer(request: web.Request, body: ChatBody, arrived: float) -> web.StreamResponse:
    """Check, render, encode, generate, respond."""
    context = request.app[CONTEXT]
    model = context.model_of(body.model)
    leg = leg_of(body.kv_transfer_params, context.info)
    check_chat(body, context)
    rendered = render(body, context)
    headers = think_max_warning(rendered.mode, context)
    if leg.kind == "prefill":
        body = first_token_body(body)
    constraint = await chat_constraint(context, body, rendered)
    ids = await encode_rendered(context, rendered, body)
    max_tokens_param, max_tokens = asked_tokens(body)
    submission = await build_submission(
        context,
        body,
        response_id=response_id("chatcmpl", body.request_id, request[REQUEST_ID]),
        prompts=[truncated(ids, body, context.info.max_model_len)],
        prompt_param="messages",
        leg=leg,
        wanted=LogprobsWanted(sample=num_logprobs(body), prompt=body.prompt_logprobs),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        default_max_tokens=context.settings.default_max_tokens,
        constraint=constraint,
    )
    shape = chat_shape(body, context, model=model, response_id=submission.response_id, rendered=rendered)
    return await respond(
        request,
        submission,
        chat_outputs(
            context,
            text_rules(body),
            rendered,
            count=len(submission.submits),
            hide_reasoning=not shape.include_reasoning,
        ),
        lambda reader: ChatResponse(reader, submission.submits, shape),
        stream=bool(body.stream),
        arrived=arrived,
        headers=headers,
    )


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
    return render_chat(
        ChatRequest(
            messages=parse_messages(body.messages),
            mode=mode,
            tools=tuple(_tool(tool.function) for tool in body.tools or ()),
            tool_choice=_tool_choice(body),
            format_text=format_text_of(body.response_format),
            continue_final=bool(body.continue_final_message),
            generation=body.add_generation_prompt is not False,
        )
    )


def _tool(function: Any) -> Tool:
    return Tool(
        name=function.name,
        description=function.description or "",
        parameters=function.parameters or {},
        strict=bool(function.strict),
    )


def _tool_choice(body: ChatBody) -> ToolChoice:
    choice = body.tool_choice
    if isinstance(choice, NamedToolChoice):
        return NamedTool(choice.function.name)
    if choice is None:
        return "auto"
    for known in _TOOL_CHOICES:
        if choice == known:
            return known
    raise RequestError("tool_choice: must be none, auto, required, or name a function", param="tool_choice")


def chat_outputs(
    context: Context, rules: TextRules, rendered: RenderedPrompt, *, count: int = 1, hide_reasoning: bool = False
) -> list[ChatOutput]:
    """One per choice, in the state in which the prompt ended."""
    tools = bool(rendered.tools)
    return [
        ChatOutput(context.tokenizer, rules, rendered.start, tools=tools, hide_reasoning=hide_reasoning)
        for _ in range(count)
    ]


def text_rules(body: ChatBody) -> TextRules:
    """How a chat's tokens become text."""
    return TextRules(
        stops=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
    )


def chat_shape(
    body: ChatBody, context: Context, *, model: str, response_id: str, rendered: RenderedPrompt
) -> ChatShape:
    """What the caller of a chat wants to see."""
    options = body.stream_options
    return ChatShape(
        response_id=response_id,
        created=context.unix_time(),
        model=model,
        names=TokenNames(context.tokenizer, as_ids=bool(body.return_tokens_as_token_ids)),
        reasoning_fields=context.settings.reasoning_fields,
        include_reasoning=body.include_reasoning is not False,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        named_tool=isinstance(body.tool_choice, NamedToolChoice),
        num_logprobs=num_logprobs(body),
        num_prompt_logprobs=body.prompt_logprobs,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        prompt_text=rendered.text if body.return_prompt_text else None,
    )


def think_max_warning(mode: Mode, context: Context) -> dict[str, str]:
    """The header that says Think Max has less context than it asks for; an error where the settings refuse that."""
    needed, has = context.settings.think_max_context, context.info.max_model_len
    if not mode.is_think_max or has >= needed:
        return {}
    message = f"Think Max asks for a context of at least {needed} tokens, this server has {has}"
    if context.settings.think_max_policy == "refuse":
        raise RequestError(f"reasoning_effort: {message}", param="reasoning_effort")
    return {"X-Tandem-Warning": message}
