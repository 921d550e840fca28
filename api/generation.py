"""All choices of one HTTP request as the engine computes them: submitted together, read together, closed together."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from api.backend import Direct, EngineClient, GenerationStream
from api.turn import Turn
from runtime.errors import TandemError
from runtime.requests import Submit, Tokens


class Generation:
    """Reads several streams through one wake-up. Leaving the `with` block aborts whatever has not ended.

    async with await Generation.start(engine, submits, rank=None) as generation:
        while generation.running:
            for choice, tokens in await generation.wait():
                ...
    """

    def __init__(self, streams: Sequence[GenerationStream], name: str = "", turn: Turn | None = None) -> None:
        """`turn` is shared by all generations of an event loop."""
        self.name = name
        """The response id, under which an operator knows it."""
        self._all = tuple(streams)
        self._live = list(enumerate(streams))
        self._loop = asyncio.get_running_loop()
        self.turn = turn or Turn()
        self._waiter: asyncio.Future[None] | None = None
        self._listen = self._call_listener
        """The same object every time: it is looked up in `turn` for every token."""
        self._listener: Callable[[], None] | None = None
        self._aborted: TandemError | None = None
        for stream in streams:
            stream.subscribe(self.wake)

    @classmethod
    async def start(
        cls,
        engine: EngineClient,
        submits: Sequence[Submit],
        *,
        rank: int | None,
        name: str = "",
        turn: Turn | None = None,
    ) -> Self:
        """Submit every choice, or none: what was submitted before one is refused is aborted."""
        streams: list[GenerationStream] = []
        try:
            for submit in submits:
                streams.append(await engine.generate(submit, rank=rank))  # noqa: PERF401 (needed if one is refused)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return cls(streams, name, turn)

    @property
    def rank(self) -> int:
        """The data-parallel rank of the first choice, for metrics."""
        return self._all[0].rank

    @property
    def num_choices(self) -> int:
        return len(self._all)

    @property
    def path(self) -> str:
        """How the prompts' states came, once every choice has a token: that of the choice that fared worst."""
        paths = {stream.path for stream in self._all}
        return next((path for path in ("", "recompute", "handoff", "local") if path in paths), "")

    @property
    def running(self) -> bool:
        """Whether a choice has not ended."""
        return bool(self._live)

    def listen(self, listener: Callable[[], None] | None, direct: Direct | None = None) -> None:
        """Call `listener` from the event loop when something arrived, once for all that came in one turn of the loop.

        Cheaper than `wait`, which resumes the whole chain of coroutines that led to it. Where there is a single choice,
        `direct` may take its steps before they are queued; several are read together, so that they leave together.
        None: stop.
        """
        self._listener = listener
        if len(self._all) == 1:
            self._all[0].subscribe(self.wake, direct)

    def wake(self) -> None:
        """Make `wait` return, or call the listener, even if nothing has arrived."""
        if self._listener is not None:
            self.turn.soon(self._listen)
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _call_listener(self) -> None:
        if self._listener is not None:
            self._listener()

    def abort(self, error: TandemError) -> None:
        """End every choice; whoever reads gets `error`."""
        self._aborted = error
        self.close()
        self.wake()

    async def wait(self) -> list[tuple[int, Tokens]]:
        """What arrived, as (choice, tokens); waits for something, or for `wake`. Raises what ended a choice."""
        arrived = self.take()
        if arrived:
            return arrived
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        return self.take()

    def take(self) -> list[tuple[int, Tokens]]:
        """What arrived, without waiting. Raises what ended a choice."""
        if self._aborted is not None:
            raise self._aborted
        if len(self._live) == 1:
            choice, stream = self._live[0]
            pending = stream.pending()
            if pending and pending[-1].finish_reason is not None:
                self._live = []
            if len(pending) == 1:
                return [(choice, pending[0])]
            return [(choice, tokens) for tokens in pending]
        arrived = []
        ended = False
        for choice, stream in self._live:
            for tokens in stream.pending():
                arrived.append((choice, tokens))
                ended = ended or tokens.finish_reason is not None
        if ended:
            over = {choice for choice, tokens in arrived if tokens.finish_reason is not None}
            self._live = [entry for entry in self._live if entry[0] not in over]
        return arrived

    def stop(self, choice: int) -> None:
        """A choice is complete for the caller (a stop string was found): abort the rest of it."""
        self._all[choice].close()
        self._live = [entry for entry in self._live if entry[0] != choice]

    def close(self) -> None:
        for stream in self._all:
            stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
