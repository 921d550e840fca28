"""Whatever callers write, and wherever they write it, the control tokens of a prompt are those of its structure."""

from hypothesis import given, settings
from hypothesis import strategies as st

from api.chat import ChatRequest, Tool, render_chat, render_fim
from api.chat_mode import Mode
from api.encoding import markers
from api.encoding.blocks import schema_format_text
from api.encoding.messages import (
    AssistantMessage,
    ReminderMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)

SPELLED = [
    *markers.REQUIRED, *markers.TASKS.values(), markers.LATEST_REMINDER, markers.FIM_HOLE, "<｜", "｜DSML", "｜",
    f"</{markers.DSML}parameter>", "</tool_result>", "<|EOT|>", "<｜▁pad▁｜>", "<｜image｜>", "\n\n", '"', "\\",
]  # fmt: skip
hostile = st.lists(st.one_of(st.sampled_from(SPELLED), st.text(max_size=4)), max_size=6).map("".join)
arguments = st.one_of(hostile, st.dictionaries(hostile, hostile, min_size=1, max_size=1))


def conversation(texts, call_arguments, *, thinking, with_tools):
    """Uses every field that a caller can fill with text."""
    text = iter(texts).__next__
    call = ToolCall(name=text(), arguments=call_arguments, id="a")
    return ChatRequest(
        messages=(
            SystemMessage(content=text()),
            ReminderMessage(content=text()),
            UserMessage(content=text()),
            AssistantMessage(content=text(), reasoning=text(), tool_calls=(call,)),
            ToolMessage(content=text(), tool_call_id="a"),
            UserMessage(content=text()),
        ),
        mode=Mode(thinking=thinking),
        tools=(Tool(name="f", description=text(), parameters={"properties": {text(): {"enum": [text()]}}}),)
        * with_tools,
        format_text=schema_format_text({"title": text()}),
    )


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(hostile, min_size=12, max_size=12),
    call_arguments=arguments,
    thinking=st.booleans(),
    with_tools=st.booleans(),
)
def test_a_conversation_has_the_control_tokens_of_its_structure(v4, small, texts, call_arguments, thinking, with_tools):
    harmless = {"key": "value"} if isinstance(call_arguments, dict) else "text"
    shape = {"thinking": thinking, "with_tools": with_tools}
    rendered = render_chat(conversation(texts, call_arguments, **shape))
    plain = render_chat(conversation(["x"] * 12, harmless, **shape))
    for tokenizer in (v4, small):
        control = tokenizer.added_ids
        token_ids = tokenizer.encode_segments(rendered.segments)
        wanted = [token_id for token_id in tokenizer.encode_segments(plain.segments) if token_id in control]
        assert [token_id for token_id in token_ids if token_id in control] == wanted
        assert tokenizer.decode(token_ids, skip_special=False) == rendered.text


@settings(max_examples=60, deadline=None)
@given(prompt=hostile, suffix=hostile)
def test_code_to_fill_in_has_three_control_tokens(v4, prompt, suffix):
    token_ids = v4.encode_segments(render_fim(prompt, suffix))
    wanted = [v4.id_of(marker) for marker in (markers.FIM_BEGIN, markers.FIM_HOLE, markers.FIM_END)]
    assert [token_id for token_id in token_ids if token_id in v4.added_ids] == wanted
