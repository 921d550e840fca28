"""What sampling needs to know about each row, kept in the order of `rows.Rows` and turned into `SamplingInputs`.

Parameters are gathered when the rows change and reused while they stay; only the uniform numbers and what depends on
the newest tokens (min_tokens, bad words, grammar) are made anew for a step, and only for rows that use them.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import Request
from engine.sampler import Pairs, Penalties, RandomRows, SamplingInputs
from engine.token_counts import TokenCounts
from engine.uniform import uniform
from kernels.sampling import Truncation

log = logging.getLogger(__name__)
T = TypeVar("T")

_GREEDY_BELOW = 1e-5
"""Temperatures below this are 0: the division would only amplify rounding."""


class _Feature:
    """Bits of what a row asks for beyond the largest logit. Plain integers: they are combined for every request."""

    RANDOM = 1 << 0
    MIN_P = 1 << 1
    TRUNCATED = 1 << 2
    BIAS = 1 << 3
    PENALTIES = 1 << 4
    LOGPROBS = 1 << 5
    BANNED = 1 << 6
    """Single ids that never appear."""
    SEQUENCES = 1 << 7
    """Ids that must not follow certain others."""
    ALLOWED = 1 << 8
    GRAMMAR = 1 << 9
    MIN_TOKENS = 1 << 10


_RANDOM = _Feature.RANDOM | _Feature.MIN_P | _Feature.TRUNCATED


@dataclass(frozen=True, slots=True)
class _Extras:
    """The parts of a request's parameters that are lists, as arrays."""

    bias_ids: NDArray[np.int64]
    bias_values: NDArray[np.float32]
    banned_ids: NDArray[np.int64]
    stop_ids: NDArray[np.int64]
    """What `min_tokens` forbids."""
    sequences: dict[int, list[tuple[int, ...]]]
    """Bad words of several ids, by their last id but one."""


class SamplingRows:
    """Sampling parameters of rows 0..n-1. Rows are added and removed exactly as in `Rows`."""

    def __init__(self, capacity: int, vocab_size: int, eos_ids: Sequence[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._eos_ids = tuple(eos_ids)
        self._device = device
        self._counts = TokenCounts(vocab_size, device)
        self._features: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self._seed: NDArray[np.uint64] = np.zeros(capacity, np.uint64)
        self._temperature: NDArray[np.float32] = np.zeros(capacity, np.float32)
        self._min_p: NDArray[np.float32] = np.zeros(capacity, np.float32)
        self._top_k: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._top_p: NDArray[np.float64] = np.zeros(capacity, np.float64)
        self._penalties: NDArray[np.float32] = np.zeros((capacity, 3), np.float32)
        self._line: NDArray[np.int64] = np.full(capacity, -1, np.int64)
        self._min_tokens: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._num_logprobs: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._words: NDArray[np.int32] = np.zeros((capacity, self._num_words), np.int32)
        """Bits as in `SamplingInputs.allowed`, for the rows with a list of allowed ids."""
        self._extras: list[_Extras | None] = [None] * capacity
        self._columns = (
            self._features, self._seed, self._temperature, self._min_p, self._top_k, self._top_p, self._penalties,
            self._line, self._min_tokens, self._num_logprobs,
        )  # fmt: skip
        self._built = SamplingInputs()
        self._stale = 0
        """Features some of whose rows have changed since `_built`."""
        self._used = 0
        """Features of any row, as of `_built`."""
        self._random_rows: NDArray[np.intp] = np.zeros(0, np.intp)
        self._sequences: list[tuple[int, dict[int, list[tuple[int, ...]]]]] = []
        """Rows with bad words of several ids, as of `_built`."""
        self._stops: tuple[Pairs, ...] = ()
        """What `min_tokens` forbids the rows that it still binds."""
        self._bound_rows = 0
        """How many those are."""

    def add(self, row: int, request: Request) -> None:
        """The parameters of the request that got this row."""
        self._line[row] = -1
        s = request.sampling
        features = 0
        if s.temperature >= _GREEDY_BELOW:
            features |= _Feature.RANDOM
            features |= _Feature.MIN_P if s.min_p > 0 else 0
            features |= _Feature.TRUNCATED if 0 < s.top_k < self._vocab_size or s.top_p < 1 else 0
        for wanted, feature in (
            (s.logit_bias, _Feature.BIAS),
            (s.allowed_token_ids, _Feature.ALLOWED),
            (s.logprobs is not None, _Feature.LOGPROBS),
            (any(len(word) == 1 for word in s.bad_words), _Feature.BANNED),
            (any(len(word) > 1 for word in s.bad_words), _Feature.SEQUENCES),
            (request.matcher is not None, _Feature.GRAMMAR),
            (s.min_tokens, _Feature.MIN_TOKENS),
        ):
            features |= feature if wanted else 0
        if s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1:
            features |= _Feature.PENALTIES
            self._line[row] = self._counts.take(request.prompt, request.generated)
        self._features[row] = features
        self._stale |= features
        self._seed[row] = request.seed
        self._temperature[row] = s.temperature
        self._min_p[row] = s.min_p
        self._top_k[row] = min(s.top_k, self._vocab_size) or self._vocab_size
        self._top_p[row] = s.top_p
        self._penalties[row] = (s.repetition_penalty, s.frequency_penalty, s.presence_penalty)
        self._min_tokens[row] = s.min_tokens
        self._num_logprobs[row] = s.logprobs or 0
        self._extras[row] = self._extras_of(request) if s.logit_bias or s.bad_words or s.min_tokens else None
        if s.allowed_token_ids:
            bits = np.zeros(32 * self._num_words, np.uint8)
            bits[list(s.allowed_token_ids)] = 1
            self._words[row] = np.packbits(bits, bitorder="little").view(np.int32)

    def _extras_of(self, request: Request) -> _Extras:
        s = request.sampling
        eos_ids = () if s.ignore_eos else self._eos_ids
        sequences: dict[int, list[tuple[int, ...]]] = {}
        for word in s.bad_words:
            if len(word) > 1:
                sequences.setdefault(word[-2], []).append(word)
        return _Extras(
            bias_ids=np.array([token_id for token_id, _ in s.logit_bias], np.int64),
            bias_values=np.array([value for _, value in s.logit_bias], np.float32),
            banned_ids=np.array([word[0] for word in s.bad_words if len(word) == 1], np.int64),
            stop_ids=np.array([*s.stop_token_ids, *eos_ids], np.int64),
            sequences=sequences,
        )

    def remove(self, row: int, last: int) -> None:
        """The row is given up and row `last` moves into its place."""
        if self._line[row] >= 0:
            self._counts.give_back(int(self._line[row]))
        self._stale |= int(self._features[row] | self._features[last])
        for column in self._columns:
            column[row] = column[last]
        if self._features[row] & _Feature.ALLOWED:
            self._words[row] = self._words[last]
        self._extras[row] = self._extras[last]
        self._extras[last] = None

    def inputs(self, requests: Sequence[Request], num_generated: NDArray[np.int64]) -> SamplingInputs:
        """For all rows, which are those of `requests`."""
        rows_changed = bool(self._stale & _Feature.MIN_TOKENS)
        if self._stale:
            self._build(len(requests))
        built = self._built
        random = built.random
        if random is not None:
            draws = uniform(self._seed[self._random_rows], num_generated[self._random_rows])
            random = RandomRows(random.rows, random.temperature, self._tensor(draws), random.min_p, random.truncation)
        return SamplingInputs(
            random=random,
            bias=built.bias,
            banned=(
                *built.banned,
                *self._forbidden_stops(num_generated[: len(requests)], rows_changed),
                *self._ends_of_sequences(requests),
            ),
            allowed=self._allowed(requests) if self._used & _Feature.GRAMMAR else built.allowed,
            penalties=built.penalties,
            logprobs=built.logprobs,
            logprob_rows=built.logprob_rows,
        )

    def needs_history(self, count: int) -> bool:
        """What some row of the first `count` may choose depends on its newest token, and only the host can say how."""
        return bool((self._features[:count] & (_Feature.GRAMMAR | _Feature.SEQUENCES)).any())

    @staticmethod
    def record(inputs: SamplingInputs, token_ids: Tensor) -> None:
        """The tokens sampled with `inputs`; int64 [B] on the device."""
        penalties = inputs.penalties
        if penalties is not None:
            penalties.counts.add(penalties.lines, token_ids[penalties.rows])

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _rows_with(self, feature: int, count: int) -> NDArray[np.intp]:
        return np.flatnonzero(self._features[:count] & feature)

    def _build(self, count: int) -> None:
        """Make anew what rows that came, went or moved have to do with."""
        self._used = int(np.bitwise_or.reduce(self._features[:count], initial=0))
        if self._stale & _Feature.SEQUENCES:
            self._sequences = [(row, extras.sequences) for row, extras in self._extras_with(_Feature.SEQUENCES, count)]
        old = self._built
        self._built = SamplingInputs(
            random=self._renewed(_RANDOM, old.random, self._build_random, count),
            bias=self._renewed(_Feature.BIAS, old.bias, self._build_bias, count),
            banned=self._renewed(_Feature.BANNED, old.banned, self._build_bans, count) or (),
            allowed=self._renewed(_Feature.ALLOWED, old.allowed, self._build_allowed, count),
            penalties=self._renewed(_Feature.PENALTIES, old.penalties, self._build_penalties, count),
            logprobs=self._renewed(_Feature.LOGPROBS, old.logprobs, self._build_logprobs, count),
            logprob_rows=tuple(self._rows_with(_Feature.LOGPROBS, count).tolist()),
        )
        self._stale = 0

    def _renewed(self, feature: int, old: T | None, build: Callable[[int], T], count: int) -> T | None:
        if not self._stale & feature:
            return old
        return build(count) if self._used & feature else None

    def _build_random(self, count: int) -> RandomRows:
        rows = self._random_rows = self._rows_with(_Feature.RANDOM, count)
        any_min_p = bool(self._used & _Feature.MIN_P)
        return RandomRows(
            rows=self._tensor(rows),
            temperature=self._tensor(self._temperature[rows]),
            uniform=torch.empty(0, dtype=torch.float64),
            min_p=self._tensor(self._min_p[rows]) if any_min_p else None,
            truncation=self._truncation(rows),
        )

    def _truncation(self, random_rows: NDArray[np.intp]) -> Truncation | None:
        members = np.flatnonzero(self._features[random_rows] & _Feature.TRUNCATED)
        rows = random_rows[members]
        if not len(rows):
            return None
        top_k = self._top_k[rows]
        return Truncation(self._tensor(members), self._tensor(top_k), self._tensor(self._top_p[rows]), int(top_k.max()))

    def _extras_with(self, feature: int, count: int) -> list[tuple[int, _Extras]]:
        return [(row, extras) for row in self._rows_with(feature, count).tolist() if (extras := self._extras[row])]

    def _pairs(self, ids_of: list[tuple[int, NDArray[np.int64]]]) -> Pairs:
        rows = np.repeat([row for row, _ in ids_of], [len(ids) for _, ids in ids_of])
        return Pairs(self._tensor(rows), self._tensor(np.concatenate([ids for _, ids in ids_of])))

    def _build_bias(self, count: int) -> Pairs:
        biased = self._extras_with(_Feature.BIAS, count)
        pairs = self._pairs([(row, extras.bias_ids) for row, extras in biased])
        values = np.concatenate([extras.bias_values for _, extras in biased])
        return Pairs(pairs.rows, pairs.ids, self._tensor(values))

    def _build_allowed(self, count: int) -> tuple[Tensor, Tensor]:
        rows = self._rows_with(_Feature.ALLOWED, count)
        return self._tensor(rows), self._tensor(self._words[rows])

    def _build_bans(self, count: int) -> tuple[Pairs, ...]:
        banning = self._extras_with(_Feature.BANNED, count)
        return (self._pairs([(row, extras.banned_ids) for row, extras in banning]),)

    def _build_penalties(self, count: int) -> Penalties:
        rows = self._rows_with(_Feature.PENALTIES, count)
        repetition, frequency, presence = (self._tensor(self._penalties[rows, i])[:, None] for i in range(3))
        return Penalties(
            rows=self._tensor(rows),
            repetition=repetition,
            frequency=frequency,
            presence=presence,
            lines=self._tensor(self._line[rows]),
            counts=self._counts,
        )

    def _build_logprobs(self, count: int) -> tuple[Tensor, int]:
        rows = self._rows_with(_Feature.LOGPROBS, count)
        wanted = self._num_logprobs[rows]
        most = self._vocab_size if wanted.min() < 0 else min(int(wanted.max()), self._vocab_size)
        return self._tensor(rows), most

    def _forbidden_stops(self, num_generated: NDArray[np.int64], rows_changed: bool) -> tuple[Pairs, ...]:
        """Stop ids of the rows with too few tokens. While rows stay the same, these can only become fewer."""
        if not self._used & _Feature.MIN_TOKENS:
            return ()
        bound = np.flatnonzero(num_generated < self._min_tokens[: len(num_generated)])
        if rows_changed or len(bound) != self._bound_rows:
            self._bound_rows = len(bound)
            stops = [(row, extras.stop_ids) for row in bound.tolist() if (extras := self._extras[row])]
            stops = [(row, stop_ids) for row, stop_ids in stops if len(stop_ids)]
            self._stops = (self._pairs(stops),) if stops else ()
        return self._stops

    def _ends_of_sequences(self, requests: Sequence[Request]) -> tuple[Pairs, ...]:
        """Last ids of the bad words whose others were generated just now."""
        rows: list[int] = []
        ids: list[int] = []
        for row, sequences in self._sequences:
            generated = requests[row].generated
            for word in sequences.get(generated[-1], ()) if generated else ():
                if tuple(generated[1 - len(word) :]) == word[:-1]:
                    rows.append(row)
                    ids.append(word[-1])
        return (Pairs(self._tensor(np.array(rows)), self._tensor(np.array(ids))),) if rows else ()

    def _allowed(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """What grammars and lists of allowed ids leave in this step."""
        rows = self._rows_with(_Feature.GRAMMAR | _Feature.ALLOWED, len(requests))
        words = np.full((len(rows), self._num_words), -1, np.int32)
        for line, row in zip(words, rows.tolist(), strict=True):
            matcher = requests[row].matcher
            if matcher is not None:
                try:
                    matcher.fill_bitmask(line)
                except Exception:
                    # One request's grammar must not end the step of all: nothing is allowed, so only this one fails.
                    log.exception("request %s: its grammar failed", requests[row].request_id)
                    line[:] = 0
            if requests[row].sampling.allowed_token_ids:
                line &= self._words[row]
        return self._tensor(rows), self._tensor(words)
