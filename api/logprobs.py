"""Log-probabilities in the shapes of the two endpoints.

JSON has no infinity: a token of probability zero is written as -9999.0, as vLLM and OpenAI do.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from runtime.requests import TokenLogprobs

FLOOR = -9999.0


class TokenTexts(Protocol):
    """How one token reads by itself."""

    def token_bytes(self, token_id: int) -> bytes: ...


class TokenNames(msgspec.Struct, frozen=True):
    """The strings that stand for tokens in a response."""

    texts: TokenTexts
    as_ids: bool = False
    """`return_tokens_as_token_ids`: write `token_id:17` instead of the text, which is not always unique."""

    def name(self, token_id: int) -> str:
        if self.as_ids:
            return f"token_id:{token_id}"
        return self.texts.token_bytes(token_id).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)


def chat_logprobs(entries: Sequence[TokenLogprobs], names: TokenNames, num_top: int) -> list[dict[str, Any]]:
    """The `content` list of a chat choice's logprobs, one entry per generated token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names.name(token_id),
            "logprob": _finite(logprob),
            "bytes": list(names.texts.token_bytes(token_id)),
        }

    return [
        {
            **entry(item.token_id, item.logprob),
            "top_logprobs": [
                entry(token_id, logprob)
                for token_id, logprob in zip(_top(item.top_ids, num_top), item.top_logprobs, strict=False)
            ],
        }
        for item in entries
    ]


def _top(ids: Sequence[int], count: int) -> Sequence[int]:
    return ids if count < 0 else ids[:count]


class CompletionLogprobs:
    """The `logprobs` object of a text completion; `text_offset` goes on where the last piece ended."""

    def __init__(self, names: TokenNames, num_top: int, offset: int = 0) -> None:
        self._names = names
        self._num_top = num_top
        self._offset = offset

    def piece(self, entries: Sequence[TokenLogprobs | None], ids: Sequence[int]) -> dict[str, Any]:
        """`ids` with their entries; None for the first token of an echoed prompt, which nothing predicted."""
        tokens, token_logprobs, top_logprobs, offsets = [], [], [], []
        for token_id, item in zip(ids, entries, strict=True):
            name = self._names.name(token_id)
            tokens.append(name)
            offsets.append(self._offset)
            self._offset += len(name)
            token_logprobs.append(None if item is None else _finite(item.logprob))
            top_logprobs.append(None if item is None else self._top_of(item))
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }

    def _top_of(self, item: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and always the one that was taken."""
        top = {
            self._names.name(token_id): _finite(logprob)
            for token_id, logprob in zip(_top(item.top_ids, self._num_top), item.top_logprobs, strict=False)
        }
        top.setdefault(self._names.name(item.token_id), _finite(item.logprob))
        return top


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], names: TokenNames, num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: per prompt token a map from token id to its logprob, rank and text."""
    positions: list[dict[str, dict[str, Any]] | None] = []
    for item in entries:
        if item is None:
            positions.append(None)
            continue
        position: dict[str, dict[str, Any]] = {
            str(item.token_id): {
                "logprob": _finite(item.logprob),
                "rank": item.rank,
                "decoded_token": names.name(item.token_id),
            }
        }
        for rank, (token_id, logprob) in enumerate(
            zip(_top(item.top_ids, num_top), item.top_logprobs, strict=False), start=1
        ):
            position.setdefault(
                str(token_id), {"logprob": _finite(logprob), "rank": rank, "decoded_token": names.name(token_id)}
            )
        positions.append(position)
    return positions
