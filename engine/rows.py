"""The requests that produce a token in every step, as parallel arrays: row i of every array is the same request.

Rows 0..n-1 are in use, without gaps: removing one moves the last into its place. Nothing is rebuilt from step to step;
what a step needs is a prefix of each array, so its cost on the host does not grow with what requests look like.
"""

import numpy as np
from numpy.typing import NDArray

from engine.request import Request


class Rows:
    """Owner of the row numbers. Capacity is the most requests that may decode at the same time."""

    def __init__(self, capacity: int, max_pages: int) -> None:
        self.requests: list[Request] = []
        self.token: NDArray[np.int64] = np.zeros(capacity, np.int64)
        """The newest token, not yet in the state; meaningless while `source` says where it is."""
        self.source: NDArray[np.int64] = np.full(capacity, -1, np.int64)
        """Where the newest token is found among those sampled by the step in flight; -1 = in `token`."""
        self.context_len: NDArray[np.int32] = np.zeros(capacity, np.int32)
        """Tokens in the state, hence the position of `token`."""
        self.num_generated: NDArray[np.int64] = np.zeros(capacity, np.int64)
        """Output tokens so far, hence the index of the next one."""
        self.max_generated: NDArray[np.int64] = np.zeros(capacity, np.int64)
        """Output tokens at which the request ends."""
        self.ignore_eos: NDArray[np.bool_] = np.zeros(capacity, np.bool_)
        self.has_stop_ids: NDArray[np.bool_] = np.zeros(capacity, np.bool_)
        self.has_grammar: NDArray[np.bool_] = np.zeros(capacity, np.bool_)
        self.slot: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self.num_pages: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self.page_table: NDArray[np.int32] = np.zeros((capacity, max_pages), np.int32)
        """Entries from `num_pages` on are left over from others: valid page ids, never to be used."""
        self._columns = (
            self.token, self.source, self.context_len, self.num_generated, self.max_generated, self.ignore_eos,
            self.has_stop_ids, self.has_grammar, self.slot, self.num_pages,
        )  # fmt: skip
        self._row_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request, context_len: int, max_generated: int) -> int:
        """A request whose first `context_len` tokens are in the state, or will be after this step's forward pass.

        `token` of the new row is for the caller to set. Returns the row.
        """
        row = len(self.requests)
        self.requests.append(request)
        self._row_of[request.request_id] = row
        sampling = request.sampling
        self.source[row] = -1
        self.context_len[row] = context_len
        self.num_generated[row] = len(request.generated)
        self.max_generated[row] = max_generated
        self.ignore_eos[row] = sampling.ignore_eos
        self.has_stop_ids[row] = bool(sampling.stop_token_ids)
        self.has_grammar[row] = request.matcher is not None
        self.slot[row] = request.owned.slot_id
        self.set_pages(row, request.owned.page_ids)
        return row

    def remove(self, request: Request) -> tuple[int, int]:
        """Returns (the row it had, the row that moved there: the last one)."""
        row = self._row_of.pop(request.request_id)
        last = len(self.requests) - 1
        moved = self.requests.pop()
        if row != last:
            self.requests[row] = moved
            self._row_of[moved.request_id] = row
            for column in self._columns:
                column[row] = column[last]
            used = self.num_pages[row]
            self.page_table[row, :used] = self.page_table[last, :used]
        return row, last

    def take_tokens(self, token_ids: NDArray[np.int64]) -> None:
        """The tokens of the newest step have reached the host."""
        count = len(self.requests)
        source = self.source[:count]
        there = source >= 0
        self.token[:count][there] = token_ids[source[there]]
        source[:] = -1

    def row_of(self, request: Request) -> int | None:
        return self._row_of.get(request.request_id)

    def set_pages(self, row: int, page_ids: list[int]) -> None:
        """All pages of a row, in order."""
        self.num_pages[row] = len(page_ids)
        self.page_table[row, : len(page_ids)] = page_ids

    def add_page(self, row: int, page_id: int) -> None:
        self.page_table[row, self.num_pages[row]] = page_id
        self.num_pages[row] += 1

    def growing(self, page_tokens: int) -> NDArray[np.intp]:
        """Rows whose newest token has no page yet."""
        count = len(self.requests)
        return np.flatnonzero(self.context_len[:count] >= self.num_pages[:count] * page_tokens)
