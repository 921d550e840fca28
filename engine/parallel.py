"""Ranks of one group that step together: what they agree on before each step.

With experts spread over the ranks, a forward pass of one needs all of them. Before each step every rank says what it
would run; all get the same answer. A rank without work takes part with an empty batch, and when nobody has work nobody
steps. `lockstep.Lockstep` is the implementation for several ranks; how tokens reach experts is `expert_exchange`.
"""

from typing import Protocol

import msgspec


class StepIntent(msgspec.Struct, frozen=True):
    """What one rank would run in the next step."""

    num_tokens: int
    """Tokens of its batch; 0 = nothing to do."""
    decode_only: bool
    """All of them are decode tokens, so a captured graph may serve."""
    num_logits: int = 0
    """Rows whose logits it wants."""
    draining: bool = False
    """It was asked to finish."""
    drained: bool = False
    """And nothing that it runs or has promised is left."""


class StepPlan(msgspec.Struct, frozen=True):
    """What all ranks run in the next step."""

    num_tokens: tuple[int, ...]
    """Tokens of every rank's batch, by rank. The largest is what sizes of buffers and graphs are chosen by."""
    decode_only: bool
    """No rank runs a prompt."""
    max_logits: int = 0
    """The most logits rows of any rank."""
    draining: bool = False
    """Some rank was asked to finish: all must, because none can go on without it."""
    drained: bool = False
    """All ranks are drained."""

    @property
    def max_tokens(self) -> int:
        return max(self.num_tokens)

    @property
    def runs(self) -> bool:
        """Somebody has work: everybody calls the model, if need be with an empty batch."""
        return any(self.num_tokens)


class Agreement(Protocol):
    """Where the exchanges of a step read what was agreed on before it."""

    @property
    def plan(self) -> StepPlan: ...


class Parallel(Protocol):
    """How an engine takes part in its group's steps. Calls come from the step thread."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    @property
    def busy(self) -> bool:
        """Another rank may be waiting for this one, or one is gone: `agree` must be called without delay, with or
        without work."""

    def agree(self, intent: StepIntent) -> StepPlan:
        """Collective while the group is busy. Raises EngineError when a peer is gone or does not answer in time."""
        ...

    def leave(self) -> None:
        """Tell the others that this rank steps no more; none of them does from then on. Waits for nobody."""


class SingleRank:
    """A group of one: agrees with itself."""

    size = 1
    busy = False

    def agree(self, intent: StepIntent) -> StepPlan:
        return StepPlan((intent.num_tokens,), intent.decode_only, intent.num_logits, intent.draining, intent.drained)

    def leave(self) -> None:
        """Nobody to tell."""
