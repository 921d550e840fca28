"""One request's life as explicit phases, and what the engine remembers of it on the host.

    WAITING ─► PREFILLING ─► DECODING ─► DONE          computed here
       │  ▲        │  │          │
       │  │        │  └► HELD ───┼─────► DONE          prefilled here for another rank (`SendState`)
       │  └────────┴─────────────┘                     preempted, or a receive that failed: computed again here
       └────► RECEIVING ─► DECODING ─► DONE            prefilled elsewhere (`ReceiveState`)

Every phase may also end in DONE at once: aborted or failed.
"""

import enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.pools import StateHolding
from engine.request_times import RequestClock
from runtime.requests import LookUpState, ReceiveState, SamplingParams, SendState, Submit, TokenLogprobs


class Phase(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    """For a slot, pages, or its turn. Owns nothing."""
    PREFILLING = "prefilling"
    """Owns a slot and all pages of its tokens so far."""
    RECEIVING = "receiving"
    """Slot and pages belong to the transfer."""
    DECODING = "decoding"
    """Everything but the newest token is in the state."""
    HELD = "held"
    """The caller has its answer; the state waits to be fetched."""
    DONE = "done"
    """Owns nothing."""


_NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.PREFILLING, Phase.RECEIVING, Phase.DONE}),
    Phase.PREFILLING: frozenset({Phase.DECODING, Phase.HELD, Phase.WAITING, Phase.DONE}),
    Phase.RECEIVING: frozenset({Phase.DECODING, Phase.WAITING, Phase.DONE}),
    Phase.DECODING: frozenset({Phase.WAITING, Phase.DONE}),
    Phase.HELD: frozenset({Phase.DONE}),
    Phase.DONE: frozenset(),
}


class ConstraintMatcher(Protocol):
    """One request's position in its grammar."""

    @property
    def is_done(self) -> bool:
        """Nothing may follow any more."""

    def fill_bitmask(self, row: NDArray[np.int32]) -> None:
        """Set bit t % 32 of word t // 32 for every token t that may come next, clear all others."""

    def accept(self, token_id: int) -> None:
        """Advance over a token that was allowed."""


class ConstraintFactory(Protocol):
    """How the engine gets matchers; given by the node, which knows grammars and the tokenizer."""

    def __call__(self, spec: bytes) -> ConstraintMatcher:
        """Raises RequestError for a specification that cannot be used."""
        ...


class Request:
    """Host-side record of one submitted request. Changed by the step thread only."""

    __slots__ = (
        "cached_tokens",
        "clock",
        "generated",
        "handoff",
        "matcher",
        "num_announced",
        "num_computed",
        "num_resumed",
        "order",
        "phase",
        "prompt",
        "prompt_logprobs",
        "request_id",
        "sampling",
        "seed",
        "state",
    )

    def __init__(self, submit: Submit, arrival: int, matcher: ConstraintMatcher | None) -> None:
        self.request_id = submit.request_id
        self.sampling: SamplingParams = submit.sampling
        self.seed = submit.sampling.seed
        assert not isinstance(submit.handoff, LookUpState), "the node looks states up before it submits"
        self.handoff: SendState | ReceiveState | None = submit.handoff
        """None once the request goes on alone: computed here, received, or computed again after a failure."""
        self.order = (submit.priority, arrival)
        """Who goes first; the largest is the youngest and is preempted first."""
        self.matcher = matcher
        self.prompt: NDArray[np.int64] = np.asarray(submit.prompt_ids, dtype=np.int64)
        self.generated: list[int] = list(submit.generated_ids)
        """Output so far, tokens of a resumed stream included."""
        self.num_computed = 0
        """While PREFILLING: tokens whose rows are in the state. Afterwards `Rows.context_len` counts on."""
        self.num_resumed = len(submit.generated_ids)
        """Output tokens that came with the request."""
        self.num_announced = 0
        """Pages a claimant has been told are final."""
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if submit.sampling.prompt_logprobs is None else [None]
        )
        """One entry per prompt token computed so far, the first has none; None if not wanted or already sent."""
        self.state: StateHolding | None = None
        self.phase = Phase.WAITING
        self.clock = RequestClock()

    def forget_state(self) -> None:
        """Pages and slot are gone; every token must be computed again."""
        self.num_computed = 0
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    def enter(self, phase: Phase) -> None:
        """Change phase; any other change than those drawn above is a bug."""
        assert phase in _NEXT[self.phase], f"{self.request_id}: {self.phase.value} -> {phase.value}"
        self.phase = phase
        if phase is Phase.PREFILLING or phase is Phase.RECEIVING:
            self.clock.begin()
        elif phase is Phase.DECODING or phase is Phase.HELD:
            self.clock.first_token()

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_emitted(self) -> int:
        """Output tokens this engine has sampled or received."""
        return len(self.generated) - self.num_resumed

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def owned(self) -> StateHolding:
        """Its pages and slot, in a phase that has them."""
        assert self.state is not None, f"{self.request_id} is {self.phase.value}"
        return self.state

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Token ids of positions start..end-1."""
        num_prompt = len(self.prompt)
        if end <= num_prompt:
            return self.prompt[start:end]
        tail = np.asarray(self.generated[max(0, start - num_prompt) : end - num_prompt], dtype=np.int64)
        return np.concatenate((self.prompt[start:], tail)) if start < num_prompt else tail
