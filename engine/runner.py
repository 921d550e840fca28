"""One step on the device: a forward pass, then the sampler. Launched at once, waited for later.

A launched step needs nothing from the host any more: decode tokens that the step before it sampled are taken from where
that step left them on the device. On a CPU the work is done when `launch` returns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import StepBatch
from engine.decode_graphs import DecodeGraphs
from engine.sampler import Logprobs, SamplingInputs, logprobs_of, sample
from model.batch import ForwardBatch
from runtime.requests import TokenLogprobs

Forward = Callable[[ForwardBatch], Tensor]
"""The model bound to its state: advances the state by the batch, returns logits float32 [L, vocab], or what the head
makes them from."""
Head = Callable[[Tensor], Tensor]
"""What `Forward` returned -> logits float32 [L, vocab]."""


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


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """Results on their way to the host."""

    token_ids: Tensor
    best: Tensor
    logprob_rows: Sequence[int]
    logprobs: Logprobs | None
    scored: Logprobs | None
    targets: NDArray[np.int64]
    """Of the scored positions."""
    done: torch.cuda.Event | None
    """After the last copy; None on a CPU."""

    def wait(self) -> StepResult:
        """When this returns, the state is written too. Raises what went wrong on the device."""
        if self.done is not None:
            self.done.synchronize()
        token_ids = self.token_ids.numpy()
        logprobs = None
        if self.logprobs is not None:
            logprobs = HostLogprobs(self.logprobs, token_ids[list(self.logprob_rows)].tolist())
        scored = None if self.scored is None else HostLogprobs(self.scored, self.targets.tolist())
        return StepResult(token_ids, self.best.numpy(), self.logprob_rows, logprobs, scored)


class Runner:
    """Runs the model and the sampler.

    forward and head: the model, cut where captured steps end. graphs: captured decode steps, which replace `forward`
    for the batches that were padded for them.
    """

    def __init__(self, forward: Forward, head: Head, sampled: Tensor, graphs: DecodeGraphs | None = None) -> None:
        self._forward = forward
        self._head = head
        self._sampled = sampled
        self._graphs = graphs

    def launch(
        self,
        step: StepBatch,
        inputs: SamplingInputs,
        record: Callable[[SamplingInputs, Tensor], None],
        num_sampled: int,
        scoring: Scoring | None,
    ) -> LaunchedStep:
        """The first `num_sampled` rows of the logits are sampled, the others scored. `record` is told the new tokens
        on the device, for counts that the next step's sampling needs."""
        try:
            with torch.inference_mode():
                return self._launch(step, inputs, record, num_sampled, scoring)
        except Exception:
            if self._sampled.is_cuda:
                # Part of it may be running; what it writes to must not be given to others before that has ended.
                torch.cuda.synchronize(self._sampled.device)
            raise

    def _launch(
        self,
        step: StepBatch,
        inputs: SamplingInputs,
        record: Callable[[SamplingInputs, Tensor], None],
        num_sampled: int,
        scoring: Scoring | None,
    ) -> LaunchedStep:
        if self._graphs is not None and step.shape is not None:
            logits = self._head(self._graphs.replay(step.shape)[:num_sampled])
        else:
            feed(step, self._sampled)
            logits = self._head(self._forward(step.batch))
        targets = np.zeros(0, np.int64)
        scored = None
        if scoring is not None:
            targets = scoring.targets
            on_device = torch.from_numpy(targets).to(logits.device)
            scored = _to_host(logprobs_of(logits[num_sampled:], on_device, min(scoring.count, logits.shape[-1])))
            logits = logits[:num_sampled]
        if not num_sampled:
            nothing = torch.zeros(0, dtype=torch.int64)
            return LaunchedStep(nothing, nothing.float(), (), None, scored, targets, _mark(logits))
        sampled = sample(logits, inputs)
        record(inputs, sampled.token_ids)
        self._sampled[:num_sampled] = sampled.token_ids
        logprobs = None if sampled.logprobs is None else _to_host(sampled.logprobs)
        token_ids, best = _copy(sampled.token_ids), _copy(sampled.best)
        return LaunchedStep(token_ids, best, inputs.logprob_rows, logprobs, scored, targets, _mark(logits))


def feed(step: StepBatch, sampled: Tensor) -> None:
    """Put the tokens that the step before has sampled where the batch expects them. Part of captured steps."""
    if step.source is not None:
        ids = step.batch.token_ids[: step.source.shape[0]]
        # -1 reads the last element, which is not used then.
        ids.copy_(torch.where(step.source < 0, ids, sampled[step.source]))


def _to_host(logprobs: Logprobs) -> Logprobs:
    return Logprobs(
        _copy(logprobs.logprob), _copy(logprobs.rank), _copy(logprobs.top_ids), _copy(logprobs.top_logprobs)
    )


def _copy(tensor: Tensor) -> Tensor:
    """A copy in pinned memory that is complete when the step's event has passed; on a CPU the tensor itself."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _mark(tensor: Tensor) -> torch.cuda.Event | None:
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event
