"""Whether a request thinks, and how hard: decided once, for the renderer and the parser alike."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from api.encoding.effort import EFFORT_NAMES, EffortProfile
from runtime.errors import RequestError

ThinkingType = Literal["enabled", "adaptive", "disabled"]


class Mode(msgspec.Struct, frozen=True):
    """`effort` is one the checkpoint knows, None without thinking; `effort_text` goes into the prompt."""

    thinking: bool
    effort: str | None = None
    effort_text: str = ""

    @property
    def is_think_max(self) -> bool:
        """The effort that asks for a context of at least 393,216 tokens."""
        return self.effort == "max"


def resolve_mode(
    *,
    profile: EffortProfile,
    default_thinking: bool,
    reasoning_effort: object = None,
    thinking: ThinkingType | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Mode:
    """Decide from everything a request may say. Raises RequestError naming the field.

    An effort of "none" always means no thinking. Otherwise an explicit switch wins (`chat_template_kwargs.thinking` or
    `.enable_thinking`, then `thinking.type`), then any effort means thinking, then the server's default counts. A
    top-level effort wins over one in `chat_template_kwargs`.
    """
    kwargs = template_kwargs or {}
    effort = _effort_name(kwargs.get("reasoning_effort") if reasoning_effort is None else reasoning_effort)
    switches = [template_switch(kwargs, key) for key in ("thinking", "enable_thinking")]
    if effort == "none":
        thinks = False
    elif any(switch is not None for switch in switches):
        thinks = any(switches)
    elif thinking is not None:
        thinks = thinking != "disabled"
    else:
        thinks = effort is not None or default_thinking
    if not thinks:
        return Mode(thinking=False)
    known = profile.default if effort is None else profile.resolve(effort)
    return Mode(thinking=True, effort=known, effort_text=profile.texts()[known])


def _effort_name(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value in EFFORT_NAMES):
        return value
    raise RequestError(f"reasoning_effort: must be one of {', '.join(EFFORT_NAMES)}", param="reasoning_effort")


def template_switch(kwargs: Mapping[str, Any], key: str) -> bool | None:
    """A switch in `chat_template_kwargs`. Raises RequestError for what is no boolean."""
    value = kwargs.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise RequestError(
        f"chat_template_kwargs.{key}: must be true or false, not {type(value).__name__}", param="chat_template_kwargs"
    )
