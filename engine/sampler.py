"""Logits to tokens, for all rows of a batch at once.

Order, as the field does it: grammar and allowed ids, logit bias, penalties, banned ids; then the largest logit where
the temperature is 0, else temperature, min-p, top-k, top-p and one draw (kernels.sampling). A row's token depends on
its logits, its seed and its output index, and on no other row.

All but the draw is plain torch on either device. B rows of the batch, V vocabulary, R rows with a temperature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.token_counts import TokenCounts
from kernels.sampling import Truncation, draw

NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True)
class RandomRows:
    """The rows that are drawn and not maximised."""

    rows: Tensor
    """int64 [R], indices into the batch."""
    temperature: Tensor
    """float32 [R], positive."""
    uniform: Tensor
    """float64 [R] in [0, 1)."""
    min_p: Tensor | None
    """float32 [R], 0 = off; None: nobody uses it."""
    truncation: Truncation | None
    """Of the rows with top-k or top-p; None: nobody uses them."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with any of the three penalties, and what they have seen."""

    rows: Tensor
    """int64 [P], indices into the batch."""
    repetition: Tensor
    """float32 [P, 1], 1 = off."""
    frequency: Tensor
    """float32 [P, 1], 0 = off."""
    presence: Tensor
    """float32 [P, 1], 0 = off."""
    lines: Tensor
    """int64 [P], lines of `counts`."""
    counts: TokenCounts


@dataclass(frozen=True, slots=True)
class Pairs:
    """(row, id) pairs of the batch, with values where they have any."""

    rows: Tensor
    """int64 [N], indices into the batch."""
    ids: Tensor
    """int64 [N]."""
    values: Tensor | None = None
    """float32 [N]."""


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What one step's sampling needs besides logits. None where no row uses a feature."""

    random: RandomRows | None = None
    bias: Pairs | None = None
    banned: tuple[Pairs, ...] = ()
    allowed: tuple[Tensor, Tensor] | None = None
    """rows int64 [G] and words int32 [G, ceil(V / 32)]: only ids t whose bit t % 32 of word t // 32 is set may be
    chosen in these rows."""
    penalties: Penalties | None = None
    logprobs: tuple[Tensor, int] | None = None
    """rows int64 [N] that want log-probabilities, and the largest number of most likely ids among them."""
    logprob_rows: tuple[int, ...] = ()
    """The same rows, ascending, for the host."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of raw logits, N rows, K most likely."""

    logprob: Tensor
    """float32 [N], of the target."""
    rank: Tensor
    """int64 [N], 1 = most likely."""
    top_ids: Tensor
    """int64 [N, K], equal ones by id."""
    top_logprobs: Tensor
    """float32 [N, K]."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_ids int64 [B]; best float32 [B], the largest logit left: not finite where no token could be chosen."""

    token_ids: Tensor
    best: Tensor
    logprobs: Logprobs | None


def sample(logits: Tensor, inputs: SamplingInputs) -> Sampled:
    """logits float32 [B, V], overwritten where rows are constrained."""
    raw = logits[inputs.logprobs[0]] if inputs.logprobs is not None else None
    _constrain(logits, inputs)
    best, token_ids = logits.max(dim=-1)
    if inputs.random is not None:
        r = inputs.random
        token_ids[r.rows] = draw(logits, best, r.rows, r.temperature, r.uniform, r.min_p, r.truncation)
    logprobs = None
    if inputs.logprobs is not None and raw is not None:
        rows, count = inputs.logprobs
        logprobs = logprobs_of(raw, token_ids[rows], count)
    return Sampled(token_ids, best, logprobs)


def logprobs_of(logits: Tensor, targets: Tensor, count: int) -> Logprobs:
    """logits float32 [N, V], targets int64 [N]: their log-probabilities and ranks, and the `count` most likely ids."""
    target_logit = logits.gather(-1, targets[:, None])
    # Summed in float64, so that the float32 of it does not show how a device divides a sum over many rows, or few.
    largest = logits.amax(dim=-1, keepdim=True)
    total = largest + (logits - largest).exp().sum(dim=-1, keepdim=True, dtype=torch.float64).log()
    rank = (logits > target_logit).sum(dim=-1) + 1
    if count < logits.shape[-1]:
        top, top_ids = logits.topk(count, dim=-1)
    else:
        top, top_ids = logits.sort(dim=-1, descending=True, stable=True)
    return Logprobs((target_logit - total).float()[:, 0], rank, top_ids, (top - total).float())


def _constrain(logits: Tensor, inputs: SamplingInputs) -> None:
    vocab = logits.shape[-1]
    if inputs.allowed is not None:
        rows, words = inputs.allowed
        bit = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((words[:, :, None] >> bit) & 1).flatten(1)[:, :vocab].bool()
        logits[rows] = logits[rows].masked_fill(~allowed, NEGATIVE_INFINITY)
    if inputs.bias is not None:
        assert inputs.bias.values is not None
        logits.index_put_((inputs.bias.rows, inputs.bias.ids), inputs.bias.values, accumulate=True)
    if inputs.penalties is not None:
        logits[inputs.penalties.rows] = _penalise(logits[inputs.penalties.rows], inputs.penalties)
    for banned in inputs.banned:
        logits[banned.rows, banned.ids] = NEGATIVE_INFINITY


def _penalise(logits: Tensor, p: Penalties) -> Tensor:
    """Repetition makes what was seen in prompt or output less likely; frequency and presence count output only."""
    output_counts = p.counts.output_counts[p.lines]
    generated = output_counts > 0
    scaled = torch.where(logits > 0, logits / p.repetition, logits * p.repetition)
    logits = torch.where(generated | p.counts.in_prompt[p.lines], scaled, logits)
    return logits - p.frequency * output_counts - p.presence * generated
