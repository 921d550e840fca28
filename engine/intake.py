"""What a request must satisfy to be taken. The API checks too, and more kindly; this is the last gate."""

import math
from dataclasses import dataclass

import numpy as np

from runtime.errors import RequestError
from runtime.requests import SamplingParams, Submit


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The numbers of one running engine, all resolved."""

    vocab_size: int
    eos_ids: tuple[int, ...]
    max_model_len: int
    page_tokens: int
    num_pages: int
    num_slots: int
    chunk_alignment: int = 1
    """Tokens of the longest compressed block, where prompts are best cut."""

    def __post_init__(self) -> None:
        if self.num_pages * self.page_tokens < self.max_model_len:
            raise ValueError(
                f"max_model_len={self.max_model_len} does not fit {self.num_pages} pages of {self.page_tokens} tokens"
            )


def check_submit(submit: Submit, shape: EngineShape) -> None:
    """Raises RequestError naming the field and the numbers."""
    num_tokens = len(submit.prompt_ids) + len(submit.generated_ids)
    if not submit.prompt_ids:
        raise RequestError("the prompt has no tokens", param="prompt")
    if num_tokens >= shape.max_model_len:
        raise RequestError(
            f"the prompt has {num_tokens} tokens and the model's limit is {shape.max_model_len} including the output",
            param="prompt",
            code="context_length_exceeded",
        )
    # An array: looking at half a million integers one by one would hold up the step.
    ids = np.asarray(submit.prompt_ids)
    if not 0 <= ids.min() <= ids.max() < shape.vocab_size:
        bad = ids[(ids < 0) | (ids >= shape.vocab_size)][0]
        raise RequestError(f"token id {bad} is outside the vocabulary of {shape.vocab_size}", param="prompt")
    _check_ids("generated_ids", submit.generated_ids, shape)
    _check_sampling(submit.sampling, shape)
    if len(submit.generated_ids) >= submit.sampling.max_tokens:
        raise RequestError(
            f"{len(submit.generated_ids)} tokens are already generated and max_tokens is {submit.sampling.max_tokens}",
            param="max_tokens",
        )


def _check_ids(param: str, ids: tuple[int, ...], shape: EngineShape) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < shape.vocab_size:
        bad = next(token_id for token_id in ids if not 0 <= token_id < shape.vocab_size)
        raise RequestError(f"token id {bad} is outside the vocabulary of {shape.vocab_size}", param=param)


def _check_sampling(s: SamplingParams, shape: EngineShape) -> None:
    for param, holds, rule in (
        ("max_tokens", s.max_tokens >= 1, "must be at least 1"),
        ("min_tokens", 0 <= s.min_tokens <= s.max_tokens, f"must lie in 0..max_tokens={s.max_tokens}"),
        ("temperature", 0 <= s.temperature < math.inf, "must not be negative"),
        ("top_p", 0 < s.top_p <= 1, "must be above 0 and at most 1"),
        ("top_k", s.top_k >= 0, "must not be negative"),
        ("min_p", 0 <= s.min_p <= 1, "must lie in 0..1"),
        ("presence_penalty", math.isfinite(s.presence_penalty), "must be finite"),
        ("frequency_penalty", math.isfinite(s.frequency_penalty), "must be finite"),
        ("repetition_penalty", 0 < s.repetition_penalty < math.inf, "must be positive"),
        ("seed", 0 <= s.seed < 2**63, "must have 63 bits"),
        ("logprobs", s.logprobs is None or s.logprobs >= -1, "must be at least -1"),
        ("prompt_logprobs", s.prompt_logprobs is None or s.prompt_logprobs >= -1, "must be at least -1"),
        ("bad_words", all(s.bad_words), "must not contain an empty sequence"),
        ("logit_bias", all(math.isfinite(value) for _, value in s.logit_bias), "must be finite"),
    ):
        if not holds:
            raise RequestError(f"{param}={getattr(s, param)}: {rule}", param=param)
    _check_ids("logit_bias", tuple(token_id for token_id, _ in s.logit_bias), shape)
    _check_ids("allowed_token_ids", s.allowed_token_ids, shape)
    _check_ids("stop_token_ids", s.stop_token_ids, shape)
    for words in s.bad_words:
        _check_ids("bad_words", words, shape)
