"""One engine rank as any API process of its node sees it: a channel, and what the rank last said about itself."""

from collections.abc import Callable

from runtime.channel import ChannelAddress, NodeChannel
from runtime.requests import EngineStats, FromEngine, RankLost, ToEngine


class EngineLink:
    """Sends to a rank and hears from it. Whether the rank lives is told by the node process, which owns it."""

    def __init__(self, address: ChannelAddress, reader: int = 0) -> None:
        """`reader`: which API process this is."""
        self.rank = address.rank
        self.stats: EngineStats | None = None
        self.on_message: Callable[[FromEngine], None] = lambda _: None
        self.address = address
        self._reader = reader
        self._channel: NodeChannel | None = None
        self._lost: str | None = None

    def open(self) -> None:
        """Must be called on a running event loop."""
        self._channel = NodeChannel(self.address, self.receive, self._reader)

    def send(self, message: ToEngine) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def trouble(self) -> str | None:
        """None when the rank can take work, else why not."""
        return self._lost

    def receive(self, message: FromEngine) -> None:
        """A message of the rank, or about it."""
        match message:
            case EngineStats():
                self.stats = message
            case RankLost():
                self._lost = message.reason
        self.on_message(message)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
