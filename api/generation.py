"""All choices of one HTTP request as the engine computes them: submitted together, read together, closed together."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from api.backend import EngineClient, GenerationStream
from runtime.errors import TandemError
from runtime.requests import Submit, Tokens


class Generation:
    """Reads several streams through one wake-up. Leaving the `with` block aborts whatever has not ended.

    async with await Generation.start(engine, submits, rank=None) as generation:
        while generation.running:
            for choice, tokens in await generation.wait():
                ...
    """

    def __init__(self, streams: Sequence[GenerationStream], name: str = "") -> None:
        self.name = name
        """The response id, under which an operator knows it."""
        self._streams: list[GenerationStream | None] = list(streams)
        self._all = tuple(streams)
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._aborted: TandemError | None = None
        self.running = len(streams)
        """Choices that have not ended."""
        for stream in streams:
            stream.subscribe(self.wake)

    @classmethod
    async def start(cls, engine: EngineClient, submits: Sequence[Submit], *, rank: int | None, name: str = "") -> Self:
        """Submit every choice, or none: what was submitted before one is refused is aborted."""
        streams: list[GenerationStream] = []
        try:
            for submit in submits:
                streams.append(await engine.generate(submit, rank=rank))  # noqa: PERF401 (needed if one is refused)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return cls(streams, name)

    def wake(self) -> None:
        """Make `wait` return, with nothing if nothing has arrived."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def abort(self, error: TandemError) -> None:
        """End every choice; whoever reads gets `error`."""
        self._aborted = error
        self.close()
        self.wake()

    async def wait(self) -> list[tuple[int, Tokens]]:
        """What arrived, as (choice, tokens); waits for something, or for `wake`. Raises what ended a choice."""
        arrived = self._collect()
        if arrived:
            return arrived
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        return self._collect()

    def _collect(self) -> list[tuple[int, Tokens]]:
        if self._aborted is not None:
            raise self._aborted
        arrived: list[tuple[int, Tokens]] = []
        for choice, stream in enumerate(self._streams):
            if stream is None:
                continue
            for tokens in stream.pending():
                arrived.append((choice, tokens))
                if tokens.finish_reason is not None:
                    self._end(choice)
        return arrived

    def stop(self, choice: int) -> None:
        """A choice is complete for the caller (a stop string was found): abort the rest of it."""
        stream = self._streams[choice]
        if stream is not None:
            stream.close()
            self._end(choice)

    def _end(self, choice: int) -> None:
        self._streams[choice] = None
        self.running -= 1

    def close(self) -> None:
        for stream in self._all:
            stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
