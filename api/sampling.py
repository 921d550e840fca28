"""Sampling fields of a request: range checks before any work, then `SamplingParams` with everything resolved.

Ranges and defaults are those of vLLM's OpenAI server, so that what ran there runs here.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Protocol

import msgspec

from api.schema import SamplingBody
from runtime.errors import RequestError
from runtime.requests import SamplingParams

MIN_TEMPERATURE = 0.01
"""Smaller ones except 0 are raised to this, below which logits overflow."""
MAX_LOGIT_BIAS = 100.0
_INT64 = range(-(2**63), 2**63)
_SEED_MASK = 2**63 - 1


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds the numbers of a request on this node."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int = 20
    max_choices: int = 128
    max_stop_strings: int = 64


class TextEncoder(Protocol):
    """The part of a tokenizer that turns plain text into ids."""

    def encode_plain(self, text: str) -> list[int]: ...


class LogprobsWanted(msgspec.Struct, frozen=True):
    """Both endpoints' ways of asking, as one. None: none; -1: the whole vocabulary."""

    sample: int | None = None
    prompt: int | None = None


def check(body: SamplingBody, limits: Limits) -> None:
    """Refuse what is out of range, before any work is done. Raises RequestError naming the field."""
    _check_ranges(body)
    _check_choices(body, limits)
    _check_stops(body, limits)
    _check_token_ids(body, limits)
    _check_stream(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of: only best_of = n is supported", param="best_of")
    if body.thinking_token_budget is not None and not -1 <= body.thinking_token_budget < 2**31:
        raise _out_of_range("thinking_token_budget", "-1 (no bound) or at least 0")
    if body.truncate_prompt_tokens is not None and (
        body.truncate_prompt_tokens < -1 or not body.truncate_prompt_tokens
    ):
        raise _out_of_range("truncate_prompt_tokens", "-1 or at least 1")
    if body.cache_salt is not None and not (
        1 <= len(body.cache_salt) <= 128 and not set("@/\\\0") & set(body.cache_salt)
    ):
        raise RequestError("cache_salt: expected 1 to 128 characters without @, /, \\ and NUL", param="cache_salt")
    if body.request_id is not None and not 1 <= len(body.request_id) <= 256:
        raise RequestError("request_id: expected 1 to 256 characters", param="request_id")


def _out_of_range(param: str, wanted: str) -> RequestError:
    return RequestError(f"{param}: must be {wanted}", param=param)


def _check_ranges(body: SamplingBody) -> None:
    for param, low, high in (
        ("temperature", 0.0, 2.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
    ):
        value = getattr(body, param)
        if value is not None and not low <= value <= high:
            raise _out_of_range(param, f"between {low:g} and {high:g}")
    if body.top_p is not None and not 0.0 < body.top_p <= 1.0:
        raise _out_of_range("top_p", "greater than 0 and at most 1")
    if body.top_k is not None and not -1 <= body.top_k < 2**31:
        raise _out_of_range("top_k", "0 or -1 (off), or at least 1")
    if body.repetition_penalty is not None and not 0.0 < body.repetition_penalty <= 1e6:
        raise _out_of_range("repetition_penalty", "greater than 0")
    if body.min_tokens is not None and not 0 <= body.min_tokens < 2**31:
        raise _out_of_range("min_tokens", "at least 0")
    for param in ("seed", "priority"):
        value = getattr(body, param)
        if value is not None and value not in _INT64:
            raise _out_of_range(param, "a 64-bit integer")


def _check_choices(body: SamplingBody, limits: Limits) -> None:
    if body.n is not None and not 1 <= body.n <= limits.max_choices:
        raise _out_of_range("n", f"between 1 and {limits.max_choices}")
    if body.n is not None and body.n > 1 and body.temperature == 0:
        raise RequestError("n: must be 1 with temperature 0, where all choices would be equal", param="n")


def _check_stops(body: SamplingBody, limits: Limits) -> None:
    stops = stop_strings(body)
    if len(stops) > limits.max_stop_strings:
        raise _out_of_range("stop", f"at most {limits.max_stop_strings} strings")
    if "" in stops:
        raise RequestError("stop: must not contain an empty string", param="stop")
    for word in body.bad_words or ():
        if not word.strip():
            raise RequestError("bad_words: must not contain an empty string", param="bad_words")


def _check_token_ids(body: SamplingBody, limits: Limits) -> None:
    for param in ("stop_token_ids", "allowed_token_ids"):
        check_token_ids(getattr(body, param) or (), param, limits.vocab_size)
    if body.allowed_token_ids is not None and not body.allowed_token_ids:
        raise RequestError("allowed_token_ids: must not be empty", param="allowed_token_ids")
    logit_bias(body, limits.vocab_size)


def _check_stream(body: SamplingBody) -> None:
    if body.stream:
        if body.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs: not available with stream=true", param="prompt_logprobs")
    elif body.stream_options is not None:
        raise RequestError("stream_options: only allowed with stream=true", param="stream_options")


def check_token_ids(ids: Sequence[int], param: str, vocab_size: int) -> None:
    """Raises RequestError unless every id is in the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(f"{param}: token ids must be between 0 and {vocab_size - 1}", param=param)


def check_logprobs(count: int | None, param: str, limits: Limits) -> None:
    """Raises RequestError unless a number of logprobs may be asked for."""
    if count is None or (count >= 0 and (count <= limits.max_logprobs or limits.max_logprobs == -1)):
        return
    if count == -1 and limits.max_logprobs == -1:
        return
    wanted = "-1 or at least 0" if limits.max_logprobs == -1 else f"between 0 and {limits.max_logprobs}"
    raise _out_of_range(param, wanted)


def stop_strings(body: SamplingBody) -> tuple[str, ...]:
    """`stop` in its two forms."""
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def logit_bias(body: SamplingBody, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Token ids and clamped biases. Raises RequestError for keys that are no ids of the vocabulary."""
    pairs = []
    for key, bias in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError("logit_bias: every key must be a token id", param="logit_bias")
        if int(key) >= vocab_size:
            raise RequestError(
                f"logit_bias: token ids must be between 0 and {vocab_size - 1}, got {int(key)}", param="logit_bias"
            )
        if not math.isfinite(bias):
            raise RequestError("logit_bias: NaN and infinite numbers are not allowed", param="logit_bias")
        pairs.append((int(key), max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, bias))))
    return tuple(pairs)


def bad_words(words: Sequence[str], encoder: TextEncoder) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenised at the start of a text and after a space."""
    sequences = []
    for word in words:
        plain = tuple(encoder.encode_plain(word.lstrip()))
        spaced = tuple(encoder.encode_plain(" " + word.lstrip()))
        sequences.append(plain)
        # A space that stays a token of its own would only repeat the plain form behind it.
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            sequences.append(spaced)
    return tuple(sequences)


def resolve_max_tokens(
    asked: int | None,
    num_prompt: int,
    max_model_len: int,
    *,
    default: int | None,
    param: str,
    prompt_param: str,
) -> int:
    """Tokens that may be generated: what was asked for, but no more than the context has left.

    Raises RequestError with code `context_length_exceeded` when the prompt leaves no room, and when more was asked
    for than the context could hold even without a prompt.
    """
    if num_prompt >= max_model_len:
        raise context_exceeded(f"has {num_prompt} tokens", max_model_len, prompt_param)
    if asked is not None and asked > max_model_len:
        raise RequestError(
            f"{param}: {asked} tokens were asked for, but the maximum context length is {max_model_len}",
            param=param,
            code="context_length_exceeded",
        )
    left = max_model_len - num_prompt
    wanted = asked if asked is not None else default
    return left if wanted is None else min(wanted, left)


def context_exceeded(length: str, max_model_len: int, param: str) -> RequestError:
    """The prompt alone fills the context. `length` says how long it is: "has 9000 tokens"."""
    return RequestError(
        f"{param}: this model's maximum context length is {max_model_len} tokens, but the prompt {length}, "
        "which leaves no room for an answer. Shorten the prompt.",
        param=param,
        code="context_length_exceeded",
    )


def sampling_params(
    body: SamplingBody,
    *,
    vocab_size: int,
    max_tokens: int,
    wanted: LogprobsWanted,
    bad_word_ids: tuple[tuple[int, ...], ...] = (),
    choice: int = 0,
    constraint: bytes | None = None,
) -> SamplingParams:
    """The parameters of one choice. Choices with one seed differ: choice k draws with seed + k."""
    temperature = 1.0 if body.temperature is None else body.temperature
    if 0.0 < temperature < MIN_TEMPERATURE:
        temperature = MIN_TEMPERATURE
    if body.seed is None or body.seed == -1:
        seed = secrets.randbits(63)
    else:
        seed = (body.seed + choice) & _SEED_MASK
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(body.min_tokens or 0, max_tokens),
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=seed,
        logit_bias=logit_bias(body, vocab_size),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=bad_word_ids,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=wanted.sample,
        prompt_logprobs=wanted.prompt,
        constraint=constraint,
    )


def check_max_tokens(asked: int | None, param: str, min_tokens: int | None, *, least: int = 1) -> None:
    """Raises RequestError for a bound below `least`, or below `min_tokens`."""
    if asked is None:
        return
    if not least <= asked < 2**31:
        raise _out_of_range(param, f"at least {least}")
    if min_tokens is not None and min_tokens > asked:
        raise RequestError(f"min_tokens: must be at most {param}={asked}, got {min_tokens}", param="min_tokens")
