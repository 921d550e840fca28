"""What `tools.bench` sends: prompts as token ids with their lengths and arrival times, from a seed.

Three workloads: uniform random lengths, log-normal lengths as in conversations, and a replayed Mooncake trace whose
equal block ids become equal tokens, so that prefix caches see the reuse that was recorded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from runtime.errors import ConfigError

TRACE_BLOCK = 512
"""Tokens per id in a trace's `hash_ids`."""
_PREFIX, _PROMPT, _BLOCK = range(3)


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send."""

    arrives_s: float | None
    """After the start of the run; None: as soon as it has a place."""
    prompt_ids: npt.NDArray[np.int32]
    output_len: int


class TraceLine(msgspec.Struct, frozen=True):
    """One line of a Mooncake trace."""

    timestamp: float
    """Milliseconds from the start."""
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def arrivals(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float | None]:
    """`count` arrivals at `rate` per second with gamma-distributed gaps (burstiness 1: Poisson). Rate inf: no times."""
    if math.isinf(rate):
        return [None] * count
    now = 0.0
    times: list[float | None] = []
    for _ in range(count):
        times.append(now)
        now += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return times


def uniform_lengths(mean: int, range_ratio: float, rng: random.Random) -> Iterator[int]:
    """Lengths between mean * (1 - range_ratio) and mean * (1 + range_ratio)."""
    low, high = max(1, round(mean * (1 - range_ratio))), max(1, round(mean * (1 + range_ratio)))
    while True:
        yield rng.randint(low, high)


def lognormal_lengths(mean: int, largest: int, rng: random.Random, sigma: float = 1.0) -> Iterator[int]:
    """Lengths with the long tail of conversations: log-normal of that mean, cut at `largest`."""
    mu = math.log(mean) - sigma * sigma / 2
    while True:
        yield min(largest, max(1, round(rng.lognormvariate(mu, sigma))))


def generated(
    inputs: Iterator[int],
    outputs: Iterator[int],
    times: Sequence[float | None],
    *,
    vocab_size: int,
    prefix_len: int,
    seed: int,
) -> list[Job]:
    """One job per arrival time. All prompts begin with the same `prefix_len` tokens, the rest is drawn anew."""
    prefix = _tokens((seed, _PREFIX), prefix_len, vocab_size)
    return [
        Job(time, np.concatenate((prefix, _tokens((seed, _PROMPT, index), length, vocab_size))), output_len)
        for index, (time, length, output_len) in enumerate(zip(times, inputs, outputs, strict=False))
    ]


def replayed(path: Path, count: int, *, vocab_size: int, speed: float, seed: int) -> list[Job]:
    """The first `count` lines of a trace, `speed` times as fast as recorded. Raises ConfigError naming the line."""
    decoder = msgspec.json.Decoder(TraceLine)
    jobs: list[Job] = []
    first_ms: float | None = None
    with path.open("rb") as file:
        for number, text in enumerate(islice(file, count), start=1):
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
            first_ms = line.timestamp if first_ms is None else first_ms
            length = line.input_length
            pieces = [_tokens((seed, _BLOCK, block), TRACE_BLOCK, vocab_size) for block in line.hash_ids]
            pieces.append(_tokens((seed, _PROMPT, number), max(0, length - TRACE_BLOCK * len(pieces)), vocab_size))
            arrives_s = (line.timestamp - first_ms) / 1000 / speed
            jobs.append(Job(arrives_s, np.concatenate(pieces)[:length], max(1, line.output_length)))
    return jobs


def _tokens(key: tuple[int, ...], count: int, vocab_size: int) -> npt.NDArray[np.int32]:
    """`count` ids that depend on `key` alone. The first 16 ids are left out: special tokens usually live there."""
    low = min(16, vocab_size - 1)
    return np.random.default_rng(key).integers(low, vocab_size, size=count, dtype=np.int32)
