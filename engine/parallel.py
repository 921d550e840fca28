"""Ranks of one node group that step together: what they agree on before each step.

With experts spread over the ranks, a forward pass of one needs all of them. Before each step every rank says what it
would run; all get the same answer. A rank without work takes part with an empty batch, and when nobody has work
nobody steps. (How tokens reach experts is `model.moe.ExpertParallel`; it belongs to the model.)
"""

from typing import Protocol

import msgspec


class StepIntent(msgspec.Struct, frozen=True):
    """What one rank would run in the next step."""

    num_tokens: int
    """Tokens of its batch; 0 = nothing to do."""
    decode_only: bool
    """All of them are decode tokens, so a captured graph may serve."""


class StepPlan(msgspec.Struct, frozen=True):
    """What all ranks run in the next step."""

    runs: bool
    """Somebody has work: everybody calls the model, if need be with an empty batch."""
    max_tokens: int
    """The largest batch of any rank; what sizes of buffers and graphs are chosen by."""
    decode_only: bool
    """No rank runs a prompt."""


class Parallel(Protocol):
    """How an engine takes part in its group's steps. Calls come from the step thread."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    def agree(self, intent: StepIntent) -> StepPlan:
        """Collective. Raises EngineError when a peer does not answer in time."""
        ...


class SingleRank:
    """A group of one: agrees with itself."""

    size = 1

    def agree(self, intent: StepIntent) -> StepPlan:
        return StepPlan(runs=intent.num_tokens > 0, max_tokens=intent.num_tokens, decode_only=intent.decode_only)
