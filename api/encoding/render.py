"""The prompt of a conversation, exactly as the model was trained to see it.

Two orders of turns exist. They agree wherever every assistant turn answers a user turn and the last turn is the user's:

* CHECKPOINT follows the encoder published with the checkpoint: a user turn opens the assistant's answer, so an
  assistant message after anything else is written without `<｜Assistant｜>`, and a conversation that does not end
  with the user gets no generation prompt.
* SERVING is what an API needs for any order of roles (DeepSeek's own API does the same): every assistant turn opens
  itself, and the prompt ends with an open assistant turn.
"""

import enum
from collections.abc import Iterable, Sequence

import msgspec

from api.encoding import markers
from api.encoding.blocks import append_tool_calls, append_tools, tool_result
from api.encoding.messages import (
    AssistantMessage,
    DeveloperMessage,
    Message,
    ReminderMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from api.encoding.segments import PromptBuilder, Segments


class Order(enum.Enum):
    CHECKPOINT = "checkpoint"
    SERVING = "serving"


class Block(msgspec.Struct, frozen=True):
    """A part of a user turn; a tool result when `call_id` is not None."""

    text: str
    call_id: str | None = None

    @property
    def rendered(self) -> str:
        return self.text if self.call_id is None else tool_result(self.text)


class UserTurn(msgspec.Struct, frozen=True):
    """Adjacent user and tool messages, which the model sees as one turn."""

    blocks: tuple[Block, ...]
    task: str | None = None


Turn = SystemMessage | DeveloperMessage | UserTurn | ReminderMessage | AssistantMessage


class _Plan(msgspec.Struct, frozen=True):
    """What the renderer of one turn must know about the whole."""

    turns: tuple[Turn, ...]
    thinking: bool
    order: Order
    num_context: int
    """Leading turns that are in an earlier part of the prompt already."""
    first_kept: int
    """Assistant turns from here on show their reasoning."""

    def thinks(self, index: int) -> bool:
        return self.thinking and index >= self.first_kept

    def opens_after(self, index: int) -> bool:
        """CHECKPOINT: whether `<｜Assistant｜>` follows turn `index`."""
        return isinstance(self.turns[index], UserTurn | DeveloperMessage) and self.is_last_of_input(index)

    def is_last_of_input(self, index: int) -> bool:
        """Whether the model, or a reminder to it, comes next."""
        following = self.turns[index + 1 : index + 2]
        return not following or isinstance(following[0], AssistantMessage | ReminderMessage)

    def answers_task(self, index: int) -> bool:
        return index > 0 and task_of(self.turns[index - 1]) is not None


def render(
    messages: Sequence[Message],
    *,
    thinking: bool,
    effort_text: str = "",
    drop_reasoning: bool = True,
    context: Sequence[Message] = (),
    bos: bool = True,
    order: Order = Order.SERVING,
    generation: bool = True,
) -> Segments:
    """Render `messages`; `context` came before them and is in the prompt already.

    `drop_reasoning` leaves out the reasoning of turns that a later user turn has settled; it has no effect when any
    message lists tools. `effort_text` goes after BOS, in thinking mode only. `generation=False` (SERVING) ends the
    prompt after the last message.
    """
    before, turns = to_turns(context), to_turns(messages)
    drop = drop_reasoning and not any(getattr(turn, "tools", ()) for turn in (*before, *turns))
    if thinking and drop:
        before, turns = without_old_developers(before), without_old_developers((*before, *turns))
    else:
        turns = (*before, *turns)
    plan = _Plan(
        turns=order_tool_results(turns),
        thinking=thinking,
        order=order,
        num_context=len(before),
        first_kept=_first_kept(turns, order) if drop else 0,
    )
    prompt = PromptBuilder()
    if bos and not context:
        prompt.marker(markers.BOS)
    if thinking and not plan.num_context:
        prompt.text(effort_text)
    for index in range(plan.num_context, len(plan.turns)):
        _append_turn(prompt, plan, index)
    if order is Order.SERVING and generation and not _is_closed(plan.turns):
        _append_opening(prompt, plan.thinking)
    return prompt.build()


def to_turns(messages: Iterable[Message]) -> tuple[Turn, ...]:
    """Merge adjacent user and tool messages; a user message does not join a turn that already asks for a task."""
    turns: list[Turn] = []
    blocks: list[Block] = []
    task: str | None = None

    def close_user_turn() -> None:
        nonlocal task
        if blocks:
            turns.append(UserTurn(tuple(blocks), task))
        blocks.clear()
        task = None

    for message in messages:
        if isinstance(message, ToolMessage):
            blocks.append(Block(message.content, message.tool_call_id or ""))
        elif isinstance(message, UserMessage):
            if task is not None:
                close_user_turn()
            blocks.append(Block(message.content))
            task = message.task
        else:
            close_user_turn()
            turns.append(message)
    close_user_turn()
    return tuple(turns)


def order_tool_results(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Put the tool results of a user turn into the order of the calls they answer; text stays where it was.

    Unknown ids count as the first call; equal places keep their order of arrival.
    """
    places: dict[str, int] = {}
    ordered: list[Turn] = []
    for turn in turns:
        if isinstance(turn, AssistantMessage) and turn.tool_calls:
            places = {call.id: place for place, call in enumerate(turn.tool_calls) if call.id}
        elif isinstance(turn, UserTurn) and places:
            results = iter(
                sorted(
                    (block for block in turn.blocks if block.call_id is not None),
                    key=lambda block: places.get(block.call_id or "", 0),
                )
            )
            blocks = tuple(block if block.call_id is None else next(results) for block in turn.blocks)
            turn = UserTurn(blocks, turn.task)
        ordered.append(turn)
    return tuple(ordered)


def without_old_developers(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Leave out developer messages that a later user or developer message has settled."""
    last_input = _last_input(turns)
    return tuple(
        turn for index, turn in enumerate(turns) if index >= last_input or not isinstance(turn, DeveloperMessage)
    )


def task_of(turn: Turn) -> str | None:
    return None if isinstance(turn, SystemMessage | ReminderMessage) else turn.task


def _last_input(turns: Sequence[Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if isinstance(turn, UserTurn | DeveloperMessage)), default=-1)


def _first_kept(turns: Sequence[Turn], order: Order) -> int:
    if order is Order.CHECKPOINT:
        return _last_input(turns) + 1
    is_open = bool(turns) and isinstance(turns[-1], AssistantMessage) and turns[-1].continued
    return len(turns) - is_open


def _is_closed(turns: Sequence[Turn]) -> bool:
    """Whether the last turn already says how the model goes on: it is continued, or asks for a task."""
    if not turns:
        return False
    last = turns[-1]
    return task_of(last) is not None or (isinstance(last, AssistantMessage) and last.continued)


def _append_turn(prompt: PromptBuilder, plan: _Plan, index: int) -> None:
    turn = plan.turns[index]
    if isinstance(turn, AssistantMessage):
        _append_assistant(prompt, plan, index, turn)
    elif isinstance(turn, UserTurn):
        prompt.marker(markers.USER)
        prompt.text("\n\n".join(block.rendered for block in turn.blocks))
    elif isinstance(turn, ReminderMessage):
        prompt.marker(markers.LATEST_REMINDER)
        prompt.text(turn.content)
    else:
        if isinstance(turn, DeveloperMessage):
            prompt.marker(markers.USER)
        _append_instructions(prompt, turn)

    task = task_of(turn)
    if task is not None and plan.is_last_of_input(index):
        if task == "action":
            _append_opening(prompt, plan.thinking)
        prompt.marker(markers.TASKS[task])
    elif plan.order is Order.CHECKPOINT and plan.opens_after(index):
        _append_opening(prompt, plan.thinks(index + 1))


def _append_instructions(prompt: PromptBuilder, message: SystemMessage | DeveloperMessage) -> None:
    prompt.text(message.content)
    if message.tools:
        prompt.text("\n\n")
        append_tools(prompt, message.tools)
    if message.format_text:
        prompt.text(f"\n\n{message.format_text}")


def _append_opening(prompt: PromptBuilder, thinks: bool) -> None:
    prompt.marker(markers.ASSISTANT)
    prompt.marker(markers.THINK_OPEN if thinks else markers.THINK_CLOSE)


def _append_assistant(prompt: PromptBuilder, plan: _Plan, index: int, message: AssistantMessage) -> None:
    answers_task = plan.answers_task(index)
    if plan.order is Order.SERVING and not answers_task:
        _append_opening(prompt, plan.thinks(index))
    if plan.thinks(index) and not answers_task:
        prompt.text(message.reasoning)
        if plan.order is Order.SERVING and is_inside_reasoning(message):
            return
        prompt.marker(markers.THINK_CLOSE)
    prompt.text(message.content)
    if message.tool_calls:
        append_tool_calls(prompt, message.tool_calls)
    if not message.continued:
        prompt.marker(markers.EOS)


def is_inside_reasoning(message: AssistantMessage) -> bool:
    """Whether a continued message has no answer yet, so that a thinking model goes on with its reasoning."""
    return message.continued and not message.content and not message.tool_calls
