"""What the HTTP surface needs from an engine, and the queue through which one request's tokens arrive.

Implemented by the node for real engine processes and by an honest stand-in in tests and benchmarks. Everything here
lives on one event loop.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, Protocol

import msgspec

from runtime.errors import EngineError, Overloaded, RequestError, TandemError, TransferError
from runtime.requests import EngineStats, RequestFailed, Submit, Tokens


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while the engine lives."""

    model_id: str
    max_model_len: int
    """Prompt and generated tokens together."""
    vocab_size: int
    """Rows of the embedding: the bound of every token id a caller may name."""
    role: Literal["prefill", "decode", "standalone"]
    num_ranks: int = 1
    node_id: str = ""
    """The name under which the node is registered with routers."""
    process: int = 0
    """Which of the node's API processes this is."""
    created: int = 0
    """Unix time of the start."""
    block_size: int = 256
    """Tokens per page."""
    checkpoint: str = ""
    """The checkpoint's directory, whose encoder tells which generation of the prompt format it was trained on."""
    version: str = "0.1.0"


Direct = Callable[[Tokens], bool]
"""Takes a step at once and answers True, or leaves it and answers False. Must not raise."""


class GenerationStream(Protocol):
    """The tokens of one submitted request, in order, ending with one that has a finish reason, or with an error."""

    @property
    def rank(self) -> int:
        """The data-parallel rank that computes it."""
        ...

    @property
    def path(self) -> str:
        """How the prompt's state came, once there is a token: "handoff", "recompute" (the hand-off failed) or "local".

        Empty for a prefill leg.
        """
        ...

    def pending(self) -> Sequence[Tokens]:
        """Everything queued since the last call; empty if nothing is. Raises what ended the request, once reached."""
        ...

    def subscribe(self, wake: Callable[[], None], direct: "Direct | None" = None) -> None:
        """Call `wake` whenever something is queued, and at once if something is queued already.

        `direct` is offered each step before it is queued, unless others wait in the queue; what it takes is not queued.
        """

    def __aiter__(self) -> AsyncIterator[Tokens]: ...

    def close(self) -> None:
        """Abort the request in the engine unless it ended. Idempotent, never blocks."""


class EngineClient(Protocol):
    """The engine processes of one node."""

    @property
    def info(self) -> EngineInfo: ...

    async def generate(self, request: Submit, *, rank: int | None = None) -> GenerationStream:
        """Submit to `rank`, or to the least loaded. Raises RequestError, Overloaded or EngineError."""
        ...

    def release(self, transfer_id: str) -> None:
        """The router gave this transfer up. Unknown ids are remembered for a while."""

    def health(self) -> str | None:
        """None when every rank can serve, else why not."""

    def ranks(self) -> Sequence[EngineStats]:
        """The last snapshot of every rank, in rank order; one of zeros for a rank that has not reported yet."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix on every rank."""


def failure(failed: RequestFailed) -> TandemError:
    """The error that a request reported by the engine as failed ends with."""
    if failed.kind == "invalid":
        return RequestError(failed.message)
    if failed.kind == "overloaded":
        return Overloaded(failed.message)
    if failed.kind == "transfer":
        return TransferError(failed.message)
    return EngineError(failed.message)


class TokenQueue:
    """The GenerationStream of every EngineClient: one writer, one reader, both on the event loop.

    `abort` is called with the request id when the reader closes before the end.
    """

    __slots__ = (
        "_abort", "_closed", "_direct", "_ended", "_error", "_offer", "_path", "_tokens", "_wake", "rank", "request_id",
    )  # fmt: skip

    def __init__(self, request_id: str, abort: Callable[[str], None], rank: int = 0, path: str = "local") -> None:
        """`path`: how the prompt's state comes unless `handed_over` is called before the first token."""
        self.request_id = request_id
        self.rank = rank
        self._path = path
        self._abort = abort
        self._tokens: list[Tokens] = []
        self._error: TandemError | None = None
        self._wake: Callable[[], None] | None = None
        self._direct: Direct | None = None
        self._offer: Direct | None = None
        """`_direct` while a step may go to it: nothing is queued and more may come."""
        self._ended = False
        self._closed = False

    @property
    def ended(self) -> bool:
        """No more will come: finished, failed, or closed by the reader."""
        return self._ended or self._closed

    @property
    def path(self) -> str:
        return self._path

    def handed_over(self) -> None:
        """The prompt's state arrived from another rank."""
        self._path = "handoff"

    def push(self, tokens: Tokens) -> None:
        """Hand over or queue one step's tokens. Ignored after the end."""
        offer = self._offer
        if offer is not None and offer(tokens):
            return
        if self._ended or self._closed:
            return
        self._offer = None
        self._tokens.append(tokens)
        self._ended = tokens.finish_reason is not None
        if self._wake is not None:
            self._wake()

    def fail(self, error: TandemError) -> None:
        """End the request with `error`, raised after what is queued was read. Ignored after the end."""
        if self.ended:
            return
        self._error = error
        self._ended = True
        self._offer = None
        if self._wake is not None:
            self._wake()

    def pending(self) -> Sequence[Tokens]:
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            if not self._ended:
                self._offer = self._direct
            return tokens
        if self._error is not None:
            raise self._error
        return ()

    def subscribe(self, wake: Callable[[], None], direct: Direct | None = None) -> None:
        self._wake = wake
        self._direct = direct
        self._offer = None if self._tokens or self.ended else direct
        if self._tokens or self._error is not None:
            wake()

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        arrived = asyncio.Event()
        self.subscribe(arrived.set)
        while True:
            for tokens in self.pending():
                yield tokens
                if tokens.finish_reason is not None:
                    return
            arrived.clear()
            if not self._tokens and self._error is None:
                await arrived.wait()

    def close(self) -> None:
        if self.ended:
            return
        self._closed = True
        self._offer = None
        self._tokens = []
        self._abort(self.request_id)
