"""Continuing a broken stream on other nodes: for which requests, and what is known of what the client has.

A Tandem decode node notes with every chunk of its answer which tokens the chunk took in (`api.resume`). Chunks go out
whole or not at all, so when the stream breaks the client has exactly the text of the noted tokens, and any node that is
given prompt and tokens can produce the rest: greedy answers go on as they would have, seeds count by position, and
grammar, tool parser and stop strings are where they were.

Not resumed: answers of several choices (a note says nothing of which), /v1/responses (its id names the node that keeps
the response), vLLM nodes (they write no notes), and answers that are not streamed, which are simply asked for again.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from api.resume import read_notes

if TYPE_CHECKING:
    from router.exchange import Exchange
    from router.request import Request

_PATHS = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/messages", "/inference/v1/generate"))


@dataclass(frozen=True, slots=True)
class Progress:
    """`kv_transfer_params.resume`: what the client has of a stream."""

    token_ids: list[int]
    created: int | None = None


def may_resume(request: "Request") -> bool:
    """Whether the request's decode leg is asked for notes."""
    return request.stream and request.choices == 1 and request.path.partition("?")[0] in _PATHS


def has_ended(exchange: "Exchange") -> bool:
    """All of the answer came, although its connection broke before saying so."""
    return exchange.notes.endswith(b";end")


def progress_of(exchange: "Exchange", before: Progress | None) -> Progress | None:
    """What the client has after `exchange` broke; `before`: what it had already. None when that is not known."""
    try:
        token_ids, _ = read_notes(bytes(exchange.notes))
    except ValueError:
        return None
    if not token_ids or exchange.head is None:
        return None
    created = exchange.head.get(b"x-tandem-created")
    return Progress(
        [*(before.token_ids if before is not None else ()), *token_ids],
        int(created) if created is not None and created.isdigit() else None,
    )
