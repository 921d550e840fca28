"""One step on the device: a forward pass, then the sampler; host arrays come back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampler import Logprobs, SamplingInputs, logprobs_of, sample
from model.batch import ForwardBatch
from runtime.requests import TokenLogprobs

Forward = Callable[[ForwardBatch], Tensor]
"""The model bound to its state: advances the state by the batch, returns logits float32 [L, vocab]."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """Prompt positions to score: the token that follows each, and the largest number of most likely ids wanted."""

    targets: NDArray[np.int64]
    count: int


class HostLogprobs:
    """`Logprobs` as Python numbers."""

    def __init__(self, logprobs: Logprobs, targets: Sequence[int]) -> None:
        self._targets = targets
        self._logprob = logprobs.logprob.tolist()
        self._rank = logprobs.rank.tolist()
        self._top_ids = logprobs.top_ids.tolist()
        self._top_logprobs = logprobs.top_logprobs.tolist()

    def messages(self, counts: Sequence[int]) -> list[TokenLogprobs]:
        """All entries, each with as many of its most likely ids as its count says, -1 for all."""
        return [
            TokenLogprobs(target, logprob, rank, tuple(ids), tuple(logprobs))
            if count < 0
            else TokenLogprobs(target, logprob, rank, tuple(ids[:count]), tuple(logprobs[:count]))
            for target, logprob, rank, ids, logprobs, count in zip(
                self._targets, self._logprob, self._rank, self._top_ids, self._top_logprobs, counts, strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step computed for B sampled rows."""

    token_ids: NDArray[np.int64]
    """[B]."""
    best: NDArray[np.float32]
    """[B]: largest logit left to choose from; -inf where nothing was allowed, NaN or inf where the model broke."""
    logprob_rows: Sequence[int]
    """The rows that asked for log-probabilities, ascending."""
    logprobs: HostLogprobs | None
    """Theirs, in that order."""
    scored: HostLogprobs | None
    """Of the scored prompt positions, in order."""


class Runner:
    """Runs the model and the sampler."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def run(
        self,
        batch: ForwardBatch,
        inputs: SamplingInputs,
        record: Callable[[Tensor], None],
        num_sampled: int,
        scoring: Scoring | None,
    ) -> StepResult:
        """The first `num_sampled` rows of the logits are sampled, the others scored. `record` is told the new tokens
        on the device, for counts that the next step's sampling needs. When this returns, the state is written."""
        with torch.inference_mode():
            return self._run(batch, inputs, record, num_sampled, scoring)

    def _run(
        self,
        batch: ForwardBatch,
        inputs: SamplingInputs,
        record: Callable[[Tensor], None],
        num_sampled: int,
        scoring: Scoring | None,
    ) -> StepResult:
        logits = self._forward(batch)
        scored = None
        if scoring is not None:
            targets = torch.from_numpy(scoring.targets).to(logits.device)
            of_prompt = logprobs_of(logits[num_sampled:], targets, min(scoring.count, logits.shape[-1]))
            scored = HostLogprobs(of_prompt, scoring.targets.tolist())
            logits = logits[:num_sampled]
        if not num_sampled:
            if logits.is_cuda:
                # Nothing was read back, yet the caller will tell others that this step's pages are final.
                torch.cuda.current_stream(logits.device).synchronize()
            return StepResult(np.zeros(0, np.int64), np.zeros(0, np.float32), (), None, scored)
        sampled = sample(logits, inputs)
        record(sampled.token_ids)
        token_ids = sampled.token_ids.cpu().numpy()
        rows: list[int] = []
        logprobs = None
        if sampled.logprobs is not None and inputs.logprobs is not None:
            rows = inputs.logprobs[0].tolist()
            logprobs = HostLogprobs(sampled.logprobs, token_ids[rows].tolist())
        return StepResult(token_ids, sampled.best.cpu().numpy(), rows, logprobs, scored)
