"""One rank of a GPU deployment without a checkpoint, peers or a router: model, state, engine, and requests that are
already where they are to be measured. What is left out is named where it is used.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.connector import ConnectorEvent, FirstToken, Received
from engine.device import enter
from engine.dummy_weights import load_dummy_weights
from engine.engine import Engine
from engine.intake import EngineShape
from engine.memory import PoolSizes, StateMemory
from kernels.exchange_rows import RowFormat, add_sums, pack_rows, unpack_rows
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.moe import ExpertCompute
from model.state import StateViews
from model.state_layout import StateLayout, build_state_layout
from model.transformer import Transformer
from runtime.requests import ReceiveState, SamplingParams, StepOutput, Submit
from runtime.token_ids import TokenIds

PAGE_TOKENS = 256


def first_layers(config: ModelConfig, count: int) -> ModelConfig:
    """The first layers of a model at its full width, without the MTP block."""
    return msgspec.structs.replace(
        config, num_hidden_layers=count, compress_ratios=config.compress_ratios[:count], num_nextn_predict_layers=0
    )


class Repeated:
    """The expert traffic of `ranks` ranks on one: every token comes once from each, with other experts. Nothing is
    sent, and of the sums only those of this rank's experts come back."""

    def __init__(self, ranks: int, num_experts: int, device: str) -> None:
        self._ranks, self._num_experts = ranks, num_experts
        self._offsets = torch.arange(0, num_experts, num_experts // ranks, device=device).view(-1, 1, 1)

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> _Sent:
        # In few launches: this is a stand-in, and its time is not the model's.
        layout = RowFormat(x_TD.shape[1], experts_TK.shape[1], x_TD.dtype, quantised=True)
        rows = pack_rows(x_TD, experts_TK, weights_TK, layout, x_TD.shape[0], self._num_experts)
        arrived = torch.cat((rows,) * self._ranks)
        experts = unpack_rows(arrived, layout)[1].unflatten(0, (self._ranks, -1))
        experts.add_(self._offsets).remainder_(self._num_experts)
        return _Sent(arrived, layout, x_TD.shape[0])


@dataclass(frozen=True)
class _Sent:
    rows_UW: Tensor
    layout: RowFormat
    num_tokens: int

    def through(self, compute: ExpertCompute, shared_TD: Tensor) -> Tensor:
        sums = compute(*unpack_rows(self.rows_UW, self.layout))
        total_TD = torch.empty_like(shared_TD)
        add_sums(sums[None, : self.num_tokens], shared_TD, total_TD)
        return total_TD


class Arriving:
    """A connector whose states are there as soon as they are asked for; their bytes are whatever the pools hold."""

    def __init__(self) -> None:
        self._events: list[ConnectorEvent] = []

    def receive(
        self, transfer_id: str, source_address: str, source_epoch: str, prompt_ids: Sequence[int],
        page_ids: Sequence[int], slot_id: int,
    ) -> None:  # fmt: skip
        first = FirstToken(token_id=7, seed=0, prompt_tokens=len(prompt_ids))
        self._events.append(
            Received(transfer_id=transfer_id, first=first, num_bytes=0, transfer_s=0.0, exposed_s=0.0, wait_s=0.0)
        )

    def poll(self) -> Sequence[ConnectorEvent]:
        events, self._events = self._events, []
        return events

    def open_send(self, transfer_id: str, prompt_ids: Sequence[int]) -> None: ...
    def pages_final(self, transfer_id: str, page_ids: Sequence[int]) -> None: ...
    def send_ready(self, transfer_id: str, page_ids: Sequence[int], slot_id: int, first: FirstToken) -> None: ...
    def cancel_send(self, transfer_id: str, reason: str) -> None: ...
    def cancel_receive(self, transfer_id: str) -> None: ...
    def release(self, transfer_id: str) -> None: ...


@dataclass(frozen=True)
class Rank:
    """A model with pools of its own."""

    config: ModelConfig
    layout: StateLayout
    memory: StateMemory
    sizes: PoolSizes
    model: Transformer
    state: StateViews

    @property
    def device(self) -> torch.device:
        return self.model.device

    def features(self, batch: ForwardBatch) -> Tensor:
        return self.model.features(batch, self.state)

    def engine(self, **settings: Any) -> Engine:
        """An engine of its own rows and pools over the rank's memory; run one at a time."""
        config = EngineConfig(
            model="", block_size=PAGE_TOKENS, max_held_requests=0, num_pages=self.sizes.num_pages,
            max_model_len=self.sizes.max_model_len,
            **{"max_num_seqs": self.sizes.num_slots, "max_num_batched_tokens": 16384, **settings},
        )  # fmt: skip
        shape = EngineShape(
            vocab_size=self.config.vocab_size, eos_ids=(1,), max_model_len=self.sizes.max_model_len,
            page_tokens=PAGE_TOKENS, num_pages=self.sizes.num_pages, num_slots=self.sizes.num_slots,
            chunk_alignment=max(1, *self.config.compress_ratios),
        )  # fmt: skip
        return Engine(
            config, shape, self.features, head=self.model.logits, connector=Arriving(), device=self.device
        )  # fmt: skip


def build_rank(config: ModelConfig, sizes: PoolSizes, device: str, *, ranks: int = 1, packed: bool = True) -> Rank:
    """A bf16 rank with dummy weights, in FP8 and FP4 if `packed`, one of `ranks` that share the experts.

    Pages hold random bytes that are finite numbers near zero in every format: entries differ, and attention is not all
    on one of them."""
    enter(torch.device(device))
    layout = build_state_layout(config, row_format="fp8", index_format="mxfp4", page_tokens=PAGE_TOKENS)
    local = config.n_routed_experts // ranks
    model = Transformer(
        config, dtype=torch.bfloat16, numerics="released", experts=range(local), device=device, packed_weights=packed,
        fp8_output=packed,
        expert_parallel=Repeated(ranks, config.n_routed_experts, device) if ranks > 1 else None,
    )  # fmt: skip
    load_dummy_weights(model, config, seed=0)
    memory = StateMemory.allocate(sizes, layout, torch.device(device))
    for pool in (memory.pages, memory.slots):
        pool.random_(0x20, 0x40)
    return Rank(config, layout, memory, sizes, model, StateViews(layout, memory.pages, memory.slots))


def start_decoding(engine: Engine, count: int, context: int, num_tokens: int = 100_000) -> None:
    """`count` greedy requests whose prompts of `context` tokens have just been received."""
    prompt = TokenIds(10 + place % 50_000 for place in range(context))
    for number in range(count):
        engine.submit(
            Submit(
                request_id=f"r{number}", prompt_ids=prompt,
                sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
                handoff=ReceiveState(transfer_id=f"t{number}", source_address="none:1", source_epoch=""),
            )
        )  # fmt: skip
    while engine.stats().running < count:
        engine.step()


def drop_all(engine: Engine, count: int) -> None:
    for number in range(count):
        engine.abort(f"r{number}")
    while engine.has_work:
        engine.step()


def generate(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int, **sampling: Any) -> list[list[int]]:
    """The tokens of prompts that run together."""
    params = SamplingParams(**{"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, **sampling})
    for number, prompt in enumerate(prompts):
        engine.submit(Submit(request_id=f"r{number}", prompt_ids=TokenIds(prompt), sampling=params))
    tokens: dict[str, list[int]] = {f"r{number}": [] for number in range(len(prompts))}
    while engine.has_work:
        for message in engine.step():
            if not isinstance(message, StepOutput):
                raise RuntimeError(f"a request failed: {message}")
            for output in message.outputs:
                tokens[output.request_id].extend(output.token_ids)
    engine.check_integrity()
    return list(tokens.values())


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call and all it launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def on_cpu(batch: ForwardBatch) -> ForwardBatch:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return ForwardBatch(**{k: v.cpu() if isinstance(v, Tensor) else v for k, v in values.items()})
