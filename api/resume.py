"""How a stream that breaks on one node can go on on another: what a router is told while it flows.

A router that sends `ASK_HEADER` gets a note with every chunk of the answer, an HTTP chunk extension (RFC 9112, 7.1.1):
the ids of the tokens taken in since the last one, `t=12.7`, and `end` on the last chunk. Extensions end at the next
hop, so clients never see them. With the ids of all chunks that it passed on, the router may ask any other node to
continue (`kv_transfer_params.resume`): that node computes prompt and ids, takes the ids through detokeniser, parser,
grammar and stop strings without showing anything, and streams what follows.
"""

from collections.abc import Iterable, Sequence

from runtime.requests import Tokens

ASK_HEADER = "X-Tandem-Resumable"
CREATED_HEADER = "X-Tandem-Created"
"""On such an answer: the `created` that every chunk repeats, for whoever continues it."""

_END = b";end"


def ids_of(arrived: Iterable[tuple[int, Tokens]]) -> list[int]:
    """The token ids of one wake-up, of a request with one choice."""
    return [token_id for _, tokens in arrived for token_id in tokens.token_ids]


def note(token_ids: Sequence[int], *, last: bool = False) -> bytes:
    """The chunk extension for these tokens."""
    ids = b";t=" + b".".join([b"%d" % token_id for token_id in token_ids]) if token_ids else b""
    return ids + _END if last else ids


def read_notes(notes: bytes) -> tuple[list[int], bool]:
    """All notes of a stream, one after the other -> the ids in order, and whether the last chunk was among them.

    Raises ValueError for anything `note` does not write.
    """
    token_ids: list[int] = []
    ended = False
    for part in notes.split(b";")[1:]:
        if part.startswith(b"t="):
            token_ids.extend(map(int, part[2:].split(b".")))
        elif part == b"end":
            ended = True
        else:
            raise ValueError(f"a chunk extension {part[:40]!r}")
    return token_ids, ended
