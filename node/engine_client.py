"""An API process's view of the engine processes of its node: submit requests, stream tokens, abort, watch the load.

Implements `api.backend.EngineClient`. Runs on the event loop and owns every request of this process from `generate`
until its end, its failure, or the closing of its stream.
"""

import logging
from collections.abc import Callable, Sequence

import msgspec

from api.backend import EngineInfo, TokenQueue, failure
from node.bootstrap import Resolver
from node.engine_link import EngineLink
from runtime.errors import EngineError, RequestError, TransferError
from runtime.requests import (
    Abort,
    EngineStats,
    FromEngine,
    Handover,
    LookUpState,
    RankLost,
    ReceiveState,
    ReleaseTransfer,
    RequestFailed,
    ResetPrefixCache,
    SendState,
    StepOutput,
    Submit,
)

log = logging.getLogger(__name__)


class NodeEngineClient:
    """All engine ranks of this node."""

    def __init__(
        self,
        info: EngineInfo,
        engines: Sequence[EngineLink],
        on_handover: Callable[[Handover], None],
        *,
        recompute: bool,
    ) -> None:
        """`recompute`: a state whose source cannot be found is computed here instead."""
        self.info = info
        self._engines = engines
        self._streams: dict[str, TokenQueue] = {}
        self._next_rank = info.process % max(1, len(engines))
        self._on_handover = on_handover
        self._resolver = Resolver()
        self._recompute = recompute
        for engine in engines:
            engine.on_message = self._on_message

    async def generate(self, request: Submit, *, rank: int | None = None) -> TokenQueue:
        """Submit a request to `rank`, or to the ranks in turn.

        Raises RequestError for a rank that is not there or a request id in use, EngineError when the rank is down. What
        the engine itself refuses is raised by the stream.
        """
        if rank is None:
            rank = self._next_rank
            self._next_rank = (rank + 1) % len(self._engines)
        if not 0 <= rank < len(self._engines):
            raise RequestError(
                f"data-parallel rank {rank} does not exist: this node has ranks 0..{len(self._engines) - 1}",
                param="x-data-parallel-rank",
            )
        path = "local" if request.handoff is None else "" if isinstance(request.handoff, SendState) else "recompute"
        if isinstance(request.handoff, LookUpState):
            request = msgspec.structs.replace(request, handoff=await self._look_up(request.handoff))
        if request.request_id in self._streams:
            raise RequestError(f"request id {request.request_id} is in use", param="request_id")
        engine = self._engines[rank]
        if (reason := engine.trouble()) is not None:
            raise EngineError(f"request {request.request_id}: {reason}")
        stream = TokenQueue(request.request_id, self._abort, rank, path)
        self._streams[request.request_id] = stream
        engine.send(msgspec.structs.replace(request, reader=self.info.process))
        return stream

    async def _look_up(self, wanted: LookUpState) -> ReceiveState | None:
        try:
            address, epoch = await self._resolver.resolve(wanted.bootstrap_address, wanted.engine_id)
        except TransferError as error:
            if not self._recompute:
                raise
            log.warning("transfer %s: %s; computing the prompt here", wanted.transfer_id, error)
            return None
        return ReceiveState(transfer_id=wanted.transfer_id, source_address=address, source_epoch=epoch)

    def _abort(self, request_id: str) -> None:
        stream = self._streams.pop(request_id)
        self._engines[stream.rank].send(Abort(request_id))

    def release(self, transfer_id: str) -> None:
        """The router gave this transfer up. Which rank holds it is not known here, so every rank is told."""
        for engine in self._engines:
            engine.send(ReleaseTransfer(transfer_id))

    def reset_prefix_cache(self) -> None:
        for engine in self._engines:
            engine.send(ResetPrefixCache())

    def health(self) -> str | None:
        """None when every rank is well, else the reason."""
        return next((reason for engine in self._engines if (reason := engine.trouble()) is not None), None)

    def ranks(self) -> Sequence[EngineStats]:
        return [engine.stats or EngineStats(rank=engine.rank) for engine in self._engines]

    @property
    def num_open(self) -> int:
        """Requests whose end is not known yet."""
        return len(self._streams)

    def fail_all(self, reason: str, rank: int | None = None) -> None:
        """Every request ends with the reason, or every one on `rank`: nothing more will come for it."""
        lost = [stream for stream in self._streams.values() if rank in (None, self._engines[stream.rank].rank)]
        for stream in lost:
            del self._streams[stream.request_id]
            stream.fail(EngineError(f"request {stream.request_id}: {reason}"))

    def _on_message(self, message: FromEngine) -> None:
        # A request that is not known here any more was aborted; its last tokens were already on their way.
        match message:
            case StepOutput(outputs):
                streams = self._streams
                for tokens in outputs:
                    if (stream := streams.get(tokens.request_id)) is not None:
                        if tokens.finish_reason is not None:
                            del streams[tokens.request_id]
                        stream.push(tokens)
            case RequestFailed():
                if (stream := self._streams.pop(message.request_id, None)) is not None:
                    stream.fail(failure(message))
            case Handover():
                if (stream := self._streams.get(message.request_id)) is not None:
                    stream.handed_over()
                self._on_handover(message)
            case RankLost(rank, reason):
                self.fail_all(reason, rank)
            case _:
                pass
