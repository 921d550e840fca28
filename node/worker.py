"""The target of an engine process: build one rank from its parts, then serve until told to stop.

This is where the parts that do not know each other meet: the engine's pools become the memory regions of the transfer,
and the transfer becomes the engine's connector.
"""

import logging
import sys
from pathlib import Path
from typing import Literal

import msgspec

from node.config import NodeConfig
from runtime import logging as logs
from runtime.channel import ChannelAddress, EngineChannel
from runtime.errors import ProcessDied, TandemError
from runtime.process import ignore_terminal_signals

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0005


class WorkerSpec(msgspec.Struct, frozen=True):
    """What an engine process is told at its start."""

    config: NodeConfig
    role: Literal["prefill", "decode", "standalone"]
    group_port: int
    """Where the ranks of this node meet when they share the experts."""


def run_rank(address: ChannelAddress, spec: WorkerSpec) -> None:
    """Serve rank `address.rank`. Exits 1 with the reason logged when it cannot start or cannot go on."""
    ignore_terminal_signals()
    logs.configure(f"{spec.role}/{address.rank}", spec.config.log_level)
    channel = EngineChannel(address)
    try:
        _serve(channel, address.rank, spec)
    except ProcessDied as error:
        log.warning("ending: %s", error)
    except TandemError as error:
        log.error("%s", error)
        raise SystemExit(1) from None


def _serve(channel: EngineChannel, rank: int, spec: WorkerSpec) -> None:
    # The transfer engine reads its environment when it is imported, and torch takes a second: both only in here.
    import torch

    from api.grammar_matcher import GrammarMatchers
    from engine.ending import end_rank
    from engine.engine import Engine
    from engine.expert_load import ExpertLoadReport
    from engine.loader import load_rank
    from engine.pool_bytes import PoolBytes
    from engine.worker import run_worker
    from kv_transfer.agent import TransferAgent
    from kv_transfer.format import StateFormat
    from kv_transfer.regions import MemoryRegion
    from node.bridge import Bridge
    from node.fingerprint import model_fingerprint
    from node.group import join_group
    from runtime.requests import EngineReady

    if not torch.cuda.is_available():
        # With one thread a token has the same bits in every batch; with more, sums are split by the batch's shape.
        torch.set_num_threads(1)
    # The transfer thread shares the interpreter with the step loop: let it in soon when something has arrived.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    member = join_group(spec.config, rank, spec.group_port) if spec.config.shares_experts else None
    if member is not None:
        channel.watch(member.group.mesh.fileno())
    loaded = load_rank(
        spec.config.engine,
        holds_states=spec.role == "prefill",
        rank=rank,
        sharing=member.sharing if member is not None else None,
        count_experts=spec.config.expert_parallel.load_counters != "off",
    )
    state_format = StateFormat(
        model_fingerprint=model_fingerprint(loaded.config, loaded.model_config),
        layout=msgspec.to_builtins(loaded.layout),
        page_bytes=loaded.layout.page_bytes,
        slot_bytes=loaded.layout.slot_bytes,
        page_tokens=loaded.layout.page_tokens,
    )
    grammars = GrammarMatchers(Path(spec.config.engine.model))
    transfer: TransferAgent | None = None
    if spec.role != "standalone":
        transfer = TransferAgent(
            spec.config.transfer.of_rank(rank),
            state_format,
            pages=MemoryRegion(loaded.memory.pages.data_ptr(), loaded.layout.page_bytes, loaded.shape.num_pages),
            slots=MemoryRegion(loaded.memory.slots.data_ptr(), loaded.layout.slot_bytes, loaded.shape.num_slots),
            rank=rank,
            memory=PoolBytes(loaded.memory.pages, loaded.memory.slots),
            wake=channel.wake,
        )
        transfer.start(spec.config.ready_timeout_s)
    engine: Engine | None = None
    try:
        engine = Engine(
            loaded.config,
            loaded.shape,
            loaded.features,
            head=loaded.model.logits,
            connector=Bridge(transfer) if transfer is not None else None,
            constraints=grammars,
            parallel=member.lockstep if member is not None else None,
            device=loaded.device,
            rank=rank,
            handoff_address=transfer.address if transfer is not None else "",
        )
        ready = EngineReady(
            rank=rank,
            epoch=transfer.epoch if transfer is not None else "",
            handoff_address=transfer.address if transfer is not None else "",
            format_digest=state_format.digest,
            format_summary=state_format.summary,
            max_model_len=loaded.shape.max_model_len,
            num_pages=loaded.shape.num_pages,
            num_slots=loaded.shape.num_slots,
        )
        expert_load: ExpertLoadReport | None = None
        if loaded.model.expert_counts is not None:
            counts = loaded.model.expert_counts[:, :-1]
            expert_load = ExpertLoadReport(counts, rank, spec.config.expert_parallel.load_interval_s)
        if member is not None:
            # With ranks on other nodes this one's readiness says nothing yet.
            member.lockstep.begin(spec.config.ready_timeout_s)
        run_worker(
            engine,
            channel,
            ready,
            expert_load,
            transfer_stats=lambda: transfer.latest_stats if transfer is not None else None,
        )
    finally:
        end_rank(engine, member.group if member is not None else None)
        grammars.close()
        if transfer is not None:
            transfer.stop(spec.config.transfer.stop_grace_s)
