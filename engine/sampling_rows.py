"""What sampling needs to know about each row, kept in the order of `rows.Rows` and turned into `SamplingInputs`.

Parameters are gathered when the rows change and reused while they stay; only the uniform numbers and what depends on
the newest tokens (min_tokens, bad words, grammar) are made anew for a step, and only for rows that use them.
"""

import enum
import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import Request
from engine.sampler import Pairs, Penalties, RandomRows, SamplingInputs
from engine.token_counts import TokenCounts
from engine.uniform import uniform

log = logging.getLogger(__name__)

_GREEDY_BELOW = 1e-5
"""Temperatures below this are 0: the division would only amplify rounding."""


class _Feature(enum.IntFlag):
    """What a row asks for beyond the largest logit."""

    RANDOM = enum.auto()
    MIN_P = enum.auto()
    SORT = enum.auto()
    BIAS = enum.auto()
    ALLOWED = enum.auto()
    PENALTIES = enum.auto()
    LOGPROBS = enum.auto()
    MIN_TOKENS = enum.auto()
    BAD_WORDS = enum.auto()
    GRAMMAR = enum.auto()


_EACH_STEP = _Feature.MIN_TOKENS | _Feature.BAD_WORDS | _Feature.GRAMMAR


class SamplingRows:
    """Sampling parameters of rows 0..n-1. Rows are added and removed exactly as in `Rows`."""

    def __init__(self, capacity: int, vocab_size: int, eos_ids: Sequence[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
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
        self._columns = (
            self._features, self._seed, self._temperature, self._min_p, self._top_k, self._top_p, self._penalties,
            self._line,
        )  # fmt: skip
        self._built_for: tuple[int, int] | None = None
        self._built = SamplingInputs()
        self._used = _Feature(0)
        self._random_rows: NDArray[np.intp] = np.zeros(0, np.intp)
        self._penalised_lines: Tensor | None = None

    def add(self, row: int, request: Request) -> None:
        """The parameters of the request that got this row."""
        self._line[row] = -1
        s = request.sampling
        features = _Feature(0)
        if s.temperature >= _GREEDY_BELOW:
            features |= _Feature.RANDOM
            features |= _Feature.MIN_P if s.min_p > 0 else _Feature(0)
            features |= _Feature.SORT if 0 < s.top_k < self._vocab_size or s.top_p < 1 else _Feature(0)
        for wanted, feature in (
            (s.logit_bias, _Feature.BIAS),
            (s.allowed_token_ids, _Feature.ALLOWED),
            (s.logprobs is not None, _Feature.LOGPROBS),
            (len(request.generated) < s.min_tokens, _Feature.MIN_TOKENS),
            (s.bad_words, _Feature.BAD_WORDS),
            (request.matcher is not None, _Feature.GRAMMAR),
        ):
            features |= feature if wanted else _Feature(0)
        if s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1:
            features |= _Feature.PENALTIES
            self._line[row] = self._counts.take(request.prompt, request.generated)
        self._features[row] = features
        self._seed[row] = request.seed
        self._temperature[row] = s.temperature
        self._min_p[row] = s.min_p
        self._top_k[row] = min(s.top_k, self._vocab_size) or self._vocab_size
        self._top_p[row] = s.top_p
        self._penalties[row] = (s.repetition_penalty, s.frequency_penalty, s.presence_penalty)

    def remove(self, row: int, last: int) -> None:
        """The row is given up and row `last` moves into its place."""
        if self._line[row] >= 0:
            self._counts.give_back(int(self._line[row]))
        for column in self._columns:
            column[row] = column[last]

    def inputs(self, requests: Sequence[Request], num_generated: NDArray[np.int64], changes: int) -> SamplingInputs:
        """For rows 0..len(requests)-1; `changes` as in `Rows`."""
        count = len(requests)
        if self._built_for != (changes, count):
            self._build(requests)
            self._built_for = (changes, count)
        if not self._used & (_Feature.RANDOM | _EACH_STEP):
            return self._built
        random, built = self._built.random, self._built
        if random is not None:
            draws = uniform(self._seed[self._random_rows], num_generated[self._random_rows])
            random = RandomRows(
                random.rows, random.temperature, self._tensor(draws), random.min_p, random.sort, random.top_k,
                random.top_p, random.max_top_k,
            )  # fmt: skip
        banned = bitmask = None
        if self._used & _EACH_STEP:
            banned, bitmask = self._banned(requests), self._bitmask(requests)
        return SamplingInputs(random, built.bias, built.allowed, banned, bitmask, built.penalties, built.logprobs)

    def record(self, token_ids: Tensor) -> None:
        """The tokens sampled with the last `inputs`; int64 [B] on the device."""
        if self._penalised_lines is not None and self._built.penalties is not None:
            self._counts.add(self._penalised_lines, token_ids[self._built.penalties.rows])

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _rows_with(self, feature: _Feature, count: int) -> NDArray[np.intp]:
        return np.flatnonzero(self._features[:count] & feature)

    def _build(self, requests: Sequence[Request]) -> None:
        count = len(requests)
        self._used = _Feature(int(np.bitwise_or.reduce(self._features[:count], initial=0)))
        used = self._used
        self._built = SamplingInputs(
            random=self._build_random(count) if used & _Feature.RANDOM else None,
            bias=self._build_bias(requests) if used & _Feature.BIAS else None,
            allowed=self._build_allowed(requests) if used & _Feature.ALLOWED else None,
            penalties=self._build_penalties(count) if used & _Feature.PENALTIES else None,
            logprobs=self._build_logprobs(requests) if used & _Feature.LOGPROBS else None,
        )

    def _build_random(self, count: int) -> RandomRows:
        rows = self._random_rows = self._rows_with(_Feature.RANDOM, count)
        sort = np.flatnonzero(self._features[rows] & _Feature.SORT)
        sorted_rows = rows[sort]
        any_min_p = bool(self._used & _Feature.MIN_P)
        return RandomRows(
            rows=self._tensor(rows),
            temperature=self._tensor(self._temperature[rows]),
            uniform=torch.empty(0, dtype=torch.float64),
            min_p=self._tensor(self._min_p[rows]) if any_min_p else None,
            sort=self._tensor(sort) if len(sort) else None,
            top_k=self._tensor(self._top_k[sorted_rows]) if len(sort) else None,
            top_p=self._tensor(self._top_p[sorted_rows]) if len(sort) else None,
            max_top_k=int(self._top_k[sorted_rows].max()) if len(sort) else 0,
        )

    def _pairs(self, rows: list[int], ids: list[int], values: list[float] | None = None) -> Pairs:
        return Pairs(
            self._tensor(np.asarray(rows, np.int64)),
            self._tensor(np.asarray(ids, np.int64)),
            None if values is None else self._tensor(np.asarray(values, np.float32)),
        )

    def _build_bias(self, requests: Sequence[Request]) -> Pairs:
        rows, ids, values = [], [], []
        for row in self._rows_with(_Feature.BIAS, len(requests)).tolist():
            for token_id, value in requests[row].sampling.logit_bias:
                rows.append(row)
                ids.append(token_id)
                values.append(value)
        return self._pairs(rows, ids, values)

    def _build_allowed(self, requests: Sequence[Request]) -> Pairs:
        rows, ids = [], []
        for row in self._rows_with(_Feature.ALLOWED, len(requests)).tolist():
            allowed = requests[row].sampling.allowed_token_ids
            rows.extend([row] * len(allowed))
            ids.extend(allowed)
        return self._pairs(rows, ids)

    def _build_penalties(self, count: int) -> Penalties:
        rows = self._rows_with(_Feature.PENALTIES, count)
        self._penalised_lines = lines = self._tensor(self._line[rows])
        repetition, frequency, presence = (self._tensor(self._penalties[rows, i])[:, None] for i in range(3))
        return Penalties(
            rows=self._tensor(rows),
            repetition=repetition,
            frequency=frequency,
            presence=presence,
            lines=lines,
            counts=self._counts,
        )

    def _build_logprobs(self, requests: Sequence[Request]) -> tuple[Tensor, int]:
        rows = self._rows_with(_Feature.LOGPROBS, len(requests))
        counts = [requests[row].sampling.logprobs or 0 for row in rows.tolist()]
        most = self._vocab_size if min(counts) < 0 else min(max(counts), self._vocab_size)
        return self._tensor(rows), most

    def _banned(self, requests: Sequence[Request]) -> Pairs | None:
        rows: list[int] = []
        ids: list[int] = []
        for row in self._rows_with(_Feature.MIN_TOKENS | _Feature.BAD_WORDS, len(requests)).tolist():
            request = requests[row]
            banned = [ids_of[-1] for ids_of in request.sampling.bad_words if _ends_with(request.generated, ids_of[:-1])]
            if len(request.generated) < request.sampling.min_tokens:
                banned.extend(request.sampling.stop_token_ids)
                if not request.sampling.ignore_eos:
                    banned.extend(self._eos_ids)
            rows.extend([row] * len(banned))
            ids.extend(banned)
        return self._pairs(rows, ids) if rows else None

    def _bitmask(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor] | None:
        rows = self._rows_with(_Feature.GRAMMAR, len(requests))
        if not len(rows):
            return None
        words = np.zeros((len(rows), -(-self._vocab_size // 32)), np.int32)
        for line, row in zip(words, rows.tolist(), strict=True):
            matcher = requests[row].matcher
            assert matcher is not None
            try:
                matcher.fill_bitmask(line)
            except Exception:
                # One request's grammar must not end the step of all: nothing is allowed, so only this request fails.
                log.exception("request %s: its grammar failed", requests[row].request_id)
                line[:] = 0
        return self._tensor(rows), self._tensor(words)


def _ends_with(generated: Sequence[int], ids: Sequence[int]) -> bool:
    return not ids or (len(generated) >= len(ids) and tuple(generated[-len(ids) :]) == tuple(ids))
