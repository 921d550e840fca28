"""Which of a node's API processes hears what an engine process says."""

from collections.abc import Iterable

from runtime.requests import (
    Abort,
    EngineStats,
    FromEngine,
    Handover,
    RequestFailed,
    StepOutput,
    Submit,
    ToEngine,
    Tokens,
)


class Replies:
    """Remembers who asked for each request, from its `Submit` to the message that ends it."""

    def __init__(self, num_readers: int) -> None:
        self._num_readers = num_readers
        self._reader_of: dict[str, int] = {}

    @property
    def num_open(self) -> int:
        """Requests whose asker is remembered."""
        return len(self._reader_of)

    def asked(self, message: ToEngine) -> None:
        """Take note of a message to the engine. Needless for a single reader, who gets everything."""
        if isinstance(message, Submit):
            assert 0 <= message.reader < self._num_readers, f"{message.request_id}: no API process {message.reader}"
            self._reader_of[message.request_id] = message.reader
        elif isinstance(message, Abort):
            self._reader_of.pop(message.request_id, None)

    def split(self, message: FromEngine) -> Iterable[tuple[int, FromEngine]]:
        """The message as (reader, part of it). What belongs to a request that was aborted goes to nobody."""
        if self._num_readers == 1:
            return ((0, message),)
        match message:
            case StepOutput(outputs):
                return self._split_step(outputs)
            case Handover() | RequestFailed():
                find = self._reader_of.pop if isinstance(message, RequestFailed) else self._reader_of.get
                reader = find(message.request_id, None)
                return () if reader is None else ((reader, message),)
            case EngineStats():
                return ((reader, message) for reader in range(self._num_readers))
            case _:
                # About the rank itself: the node process owns it.
                return ((0, message),)

    def _split_step(self, outputs: Iterable[Tokens]) -> Iterable[tuple[int, FromEngine]]:
        parts: list[list[Tokens]] = [[] for _ in range(self._num_readers)]
        reader_of = self._reader_of
        for tokens in outputs:
            reader = reader_of.get(tokens.request_id)
            if reader is not None:
                parts[reader].append(tokens)
                if tokens.finish_reason is not None:
                    del reader_of[tokens.request_id]
        return ((reader, StepOutput(tuple(part))) for reader, part in enumerate(parts) if part)
