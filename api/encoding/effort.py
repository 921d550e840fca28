"""Which reasoning-effort table a checkpoint was trained on, and the text each effort inserts.

Two generations of the format differ in nothing else, and neither config.json nor tokenizer_config.json tells them
apart; the encoder file shipped in the checkpoint folder does.
"""

import enum
from pathlib import Path
from typing import Final

ABSOLUTE_MAXIMUM: Final = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
BEYOND_MAXIMUM: Final = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose "
    "the problem into its most fundamental components, trace every causal chain to its root, and resolve the "
    "underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)

EFFORT_NAMES: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""What a request may ask for; "none" means no thinking at all."""


class EffortProfile(enum.Enum):
    """A generation of checkpoints: V4-Flash, V4-Pro, DSpark are PREVIEW; V4-Flash-0731 and later are GA_0731."""

    PREVIEW = "preview"
    GA_0731 = "0731"

    @property
    def default(self) -> str:
        """The effort of a thinking request that names none."""
        return "high"

    def resolve(self, name: str) -> str:
        """Map a requested effort (one of EFFORT_NAMES, not "none") to one the checkpoint knows."""
        return _REQUEST_TO_EFFORT[self][name]

    def texts(self) -> dict[str, str]:
        """Efforts the checkpoint knows -> the text to insert after BOS ("" for most)."""
        return _EFFORT_TEXT[self]


_REQUEST_TO_EFFORT: Final = {
    EffortProfile.PREVIEW: {
        "minimal": "high",
        "low": "high",
        "medium": "high",
        "high": "high",
        "xhigh": "max",
        "max": "max",
    },
    EffortProfile.GA_0731: {
        "minimal": "low",
        "low": "low",
        "medium": "high",
        "high": "high",
        "xhigh": "high",
        "max": "max",
    },
}
_EFFORT_TEXT: Final = {
    EffortProfile.PREVIEW: {"high": "", "max": ABSOLUTE_MAXIMUM},
    EffortProfile.GA_0731: {"low": "", "high": ABSOLUTE_MAXIMUM, "max": BEYOND_MAXIMUM},
}


def detect_profile(checkpoint: Path) -> EffortProfile:
    """Read the generation off the checkpoint's `encoding/encoding_dsv4.py`; without that file it is a preview one."""
    encoder = checkpoint / "encoding" / "encoding_dsv4.py"
    try:
        source = encoder.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return EffortProfile.PREVIEW
    if "REASONING_EFFORT_PROMPTS" in source:
        return EffortProfile.GA_0731
    if "REASONING_EFFORT_MAX" in source:
        return EffortProfile.PREVIEW
    raise ValueError(
        f"{encoder}: defines neither REASONING_EFFORT_MAX (preview) nor REASONING_EFFORT_PROMPTS (0731); "
        "set the effort profile explicitly"
    )
