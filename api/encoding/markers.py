"""The control tokens of the DeepSeek-V4 prompt format, by their spelling.

Ids are looked up in the checkpoint's tokenizer, never written here. `｜` is U+FF5C and `▁` is U+2581.
"""

import re
from typing import Final

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
LATEST_REMINDER: Final = "<｜latest_reminder｜>"
THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"
DSML: Final = "｜DSML｜"
FIM_BEGIN: Final = "<｜fim▁begin｜>"
FIM_HOLE: Final = "<｜fim▁hole｜>"
FIM_END: Final = "<｜fim▁end｜>"

TASKS: Final = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
"""Task name on a message -> the token that asks the model for it."""

REQUIRED: Final = (BOS, EOS, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, DSML)
"""What every chat needs; a tokenizer without one of these cannot serve chats."""

_IN_TEMPLATES = re.compile(f"({THINK_OPEN}|{THINK_CLOSE}|{DSML})")


def split_template(text: str) -> tuple[str, ...]:
    """Cut a text of ours at the markers it spells: plain at even positions, markers at odd ones."""
    return tuple(_IN_TEMPLATES.split(text))
