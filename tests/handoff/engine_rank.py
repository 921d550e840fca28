"""An engine rank in a process of its own, driven over a pipe: what `node.worker` joins together, without a node."""

import multiprocessing
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import msgspec
import torch

from engine.config import EngineConfig
from engine.ending import end_rank
from engine.engine import Engine
from engine.loader import load_rank
from engine.pool_bytes import PoolBytes
from kv_transfer.agent import TransferAgent
from kv_transfer.config import TransferConfig
from kv_transfer.format import StateFormat
from kv_transfer.regions import MemoryRegion
from node.bridge import Bridge
from node.config import NodeConfig
from node.expert_parallel import ExpertParallelConfig
from node.fingerprint import model_fingerprint
from node.group import Membership, join_group
from runtime.requests import ReceiveState, RequestFailed, SamplingParams, SendState, StepOutput, Submit, TokenLogprobs
from runtime.token_ids import TokenIds

Role = Literal["prefill", "decode", "standalone"]


@dataclass(frozen=True)
class Ask:
    """One request. It crosses the pipe in place of a `Submit`, whose ids do not pickle."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    handoff: SendState | ReceiveState | None = None


@dataclass
class Answer:
    """All that a client would see of a request, to the last bit of its numbers."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Place:
    """A rank among those that share the experts, and where they meet."""

    rank: int
    size: int
    port: int
    sharing: ExpertParallelConfig = field(default_factory=ExpertParallelConfig)


@dataclass(frozen=True)
class Ready:
    address: str
    epoch: str
    num_pages: int


class RankProcess:
    """The test's end of one rank."""

    def __init__(
        self, role: Role, config: EngineConfig, transfer: TransferConfig | None = None, place: Place | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, role, config, transfer, place), daemon=True)
        self._process.start()
        theirs.close()
        self.answers: dict[str, Answer] = {}

    def wait_ready(self, timeout_s: float) -> Ready:
        ready = self._receive(timeout_s)
        assert isinstance(ready, Ready), ready
        return ready

    def ask(self, asks: Sequence[Ask]) -> None:
        self._pipe.send(list(asks))

    def collect(self, timeout_s: float) -> None:
        """Take one message of the rank in."""
        said = self._receive(timeout_s)
        assert isinstance(said, StepOutput), said
        for tokens in said.outputs:
            answer = self.answers.setdefault(tokens.request_id, Answer())
            answer.token_ids += tokens.token_ids
            answer.logprobs += tokens.logprobs
            answer.finish_reason = tokens.finish_reason

    def finish(self, count: int, timeout_s: float) -> dict[str, Answer]:
        """The answers, once `count` have ended."""
        while sum(answer.finish_reason is not None for answer in self.answers.values()) < count:
            self.collect(timeout_s)
        return self.answers

    def _receive(self, timeout_s: float) -> Any:
        assert self._pipe.poll(timeout_s), f"no word for {timeout_s} s"
        try:
            said = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise AssertionError(f"the rank ended with exit code {self._process.exitcode}") from None
        assert not isinstance(said, str), said
        return said

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def ends_within(self, timeout_s: float) -> bool:
        self._process.join(timeout_s)
        return self._process.exitcode is not None

    def last_words(self, timeout_s: float) -> str:
        """What a rank says that cannot go on."""
        while True:
            assert self._pipe.poll(timeout_s), f"no word for {timeout_s} s"
            said = self._pipe.recv()
            if isinstance(said, str):
                return said

    def stop(self) -> None:
        """Ask it to audit its pools and end; a rank that does not is killed."""
        try:
            if self._process.is_alive():
                with suppress(BrokenPipeError):  # it has ended with an error, which was shown
                    self._pipe.send(None)
                    self._receive(20)
        finally:
            self._pipe.close()
            self._process.join(10)
            self._process.kill()
            self._process.join()
        assert self._process.exitcode == 0


def main(
    pipe: Connection, role: Role, config: EngineConfig, transfer: TransferConfig | None, place: Place | None
) -> None:
    """Runs in the rank's process; tells the parent in words what went wrong."""
    torch.set_num_threads(1)
    member = engine = None
    try:
        if place is not None:
            together = NodeConfig(
                engine=config, data_parallel_size=place.size, enable_expert_parallel=True, expert_parallel=place.sharing
            )
            member = join_group(together, place.rank, place.port)
        engine, agent = _build(role, config, transfer, member, 0 if place is None else place.rank)
        if member is not None:
            member.lockstep.begin(60.0)
        _answer(pipe, engine, agent)
    except Exception:
        pipe.send(traceback.format_exc())
        raise
    finally:
        end_rank(engine, None if member is None else member.group)


def _build(
    role: Role, config: EngineConfig, transfer: TransferConfig | None, member: Membership | None, rank: int
) -> tuple[Engine, TransferAgent | None]:
    sharing = None if member is None else member.sharing
    loaded = load_rank(config, holds_states=role == "prefill", rank=rank, sharing=sharing, progress=False)
    # What a transfer leaves out shows as NaN.
    loaded.memory.pages.fill_(0xFF)
    loaded.memory.slots.fill_(0xFF)
    agent = None
    if transfer is not None:
        layout, memory = loaded.layout, PoolBytes(loaded.memory.pages, loaded.memory.slots)
        state_format = StateFormat(
            model_fingerprint=model_fingerprint(loaded.config, loaded.model_config),
            layout=msgspec.to_builtins(layout),
            page_bytes=layout.page_bytes,
            slot_bytes=layout.slot_bytes,
            page_tokens=layout.page_tokens,
        )
        agent = TransferAgent(
            transfer, state_format, rank=0, memory=memory,
            pages=MemoryRegion(loaded.memory.pages.data_ptr(), layout.page_bytes, loaded.shape.num_pages),
            slots=MemoryRegion(loaded.memory.slots.data_ptr(), layout.slot_bytes, loaded.shape.num_slots),
        )  # fmt: skip
        agent.start()
    engine = Engine(
        loaded.config, loaded.shape, loaded.features, head=loaded.model.logits, device=loaded.device,
        connector=Bridge(agent) if agent is not None else None,
        handoff_address=agent.address if agent is not None else "",
        parallel=member.lockstep if member is not None else None,
    )  # fmt: skip
    return engine, agent


def _answer(pipe: Connection, engine: Engine, agent: TransferAgent | None) -> None:
    """Until the parent has no more to ask; then nothing may be left over."""
    address, epoch = ("", "") if agent is None else (agent.address, agent.epoch)
    pipe.send(Ready(address, epoch, engine.shape.num_pages))
    while True:
        if pipe.poll(0.0 if engine.has_work else 0.001):
            asks = pipe.recv()
            if asks is None:
                break
            for ask in asks:
                prompt = TokenIds(ask.prompt)
                engine.submit(
                    Submit(request_id=ask.request_id, prompt_ids=prompt, sampling=ask.sampling, handoff=ask.handoff)
                )
        for said in engine.step():
            if isinstance(said, RequestFailed):
                pipe.send(f"request {said.request_id} failed: {said.message}")
            elif isinstance(said, StepOutput):
                pipe.send(said)
    engine.leave_group()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.pages_free, stats.slots_free) == (stats.pages_total, stats.slots_total), stats
    if agent is not None:
        agent.check_integrity()
        agent.stop()
    pipe.send(Ready(address, epoch, stats.pages_free))
