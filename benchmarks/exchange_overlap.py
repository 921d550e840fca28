"""What the parts of a large step hide of the exchange between ranks that share the experts.

    python -m benchmarks.exchange_overlap [--tokens 16384] [--parts 1,2,4] [--sums float32,bfloat16]

A GPU for each rank, one MoE sublayer of DeepSeek-V4-Flash at full width with dummy weights: gate, exchange over NCCL,
this rank's share of the routed experts on everybody's tokens, the shared expert, the sum. Each rank brings `--tokens`.

    alone     the sublayer with every token twice (three times ...) as if it had come from the others: nothing is sent
    exchange  nothing but the exchange, in one part: rows out, sums back
    in N      the sublayer as it is served, in N parts

What N parts hide is what is missing of alone + exchange; one GPU shows only that all of it runs. All figures are
medians of the slowest rank, milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from benchmarks.expert_exchange import EXPERTS, FixedPlan, on_every_rank, tokens_of
from benchmarks.gpu_rank import Repeated, first_layers, seconds
from engine.dummy_weights import load_dummy_weights
from engine.expert_exchange import ExpertExchange
from engine.rank_group import RankGroup
from kernels.activations import Activations
from kernels.exchange_rows import QuantizedTokens
from model.batch import ForwardBatch
from model.context import ForwardContext
from model.moe import ExpertParallel, SentTokens
from model.presets import flash
from model.transformer import Transformer

LAYERS = 4
"""The last of them is the first whose tokens choose experts by score."""
REPEATS = 15
TIMEOUT_S = 60.0


class Times(msgspec.Struct, frozen=True):
    """Milliseconds on one rank."""

    alone: float
    exchange: float
    in_parts: dict[str, float]


class Chosen:
    """Whatever way the tokens are to go."""

    def __init__(self) -> None:
        self.way: ExpertParallel

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> SentTokens:
        return self.way.send(x_TD, experts_TK, weights_TK)


def measure(group: RankGroup, tokens: int, parts: list[int], sums: list[str]) -> Times:
    device, config = group.device, first_layers(flash(), LAYERS)
    chosen, local = Chosen(), config.n_routed_experts // group.size
    model = Transformer(
        config, dtype=torch.bfloat16, numerics="released", experts=range(group.rank * local, (group.rank + 1) * local),
        device=device, packed_weights=True, expert_parallel=chosen,
    )  # fmt: skip
    load_dummy_weights(model, config, seed=group.rank)
    generator = torch.Generator(device).manual_seed(group.rank)
    x = Activations(torch.randn(tokens, config.hidden_size, device=device, generator=generator).bfloat16())
    context = one_prompt(tokens, device)

    def sublayer() -> Tensor:
        return model.layers[-1].ffn(x, context)

    def exchange(part_tokens: int, dtype: str = "float32") -> ExpertExchange:
        plan = FixedPlan(group.size, tokens)
        return ExpertExchange(
            group, plan, num_experts=EXPERTS, quantised=True, part_tokens=part_tokens, sums=getattr(torch, dtype)
        )  # fmt: skip

    def median_ms(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        times = []
        for _ in range(REPEATS):
            group.least(0, TIMEOUT_S)
            times.append(1e3 * seconds(call, device))
        return statistics.median(times)

    chosen.way = Repeated(group.size, EXPERTS, str(device))
    alone = median_ms(sublayer)
    rows, nothing = tokens_of(group.rank, tokens, config.hidden_size, 0, device), torch.zeros_like(x.plain)
    whole = exchange(tokens)
    bare = median_ms(lambda: whole.send(*rows).through(no_experts, nothing))
    in_parts: dict[str, float] = {}
    for dtype in sums:
        for count in parts:
            chosen.way = exchange(-(-tokens // count), dtype)
            in_parts[f"in {count}, {dtype} sums"] = median_ms(sublayer)
    return Times(alone, bare, in_parts)


def no_experts(
    x: Tensor | QuantizedTokens, experts: Tensor, weights: Tensor, /, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=experts.device)


def one_prompt(tokens: int, device: torch.device) -> ForwardContext:
    """A sublayer that only looks at its rows asks for little of a batch."""
    places = torch.arange(tokens, device=device)
    batch = ForwardBatch(
        token_ids=places, positions=places, query_start=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        context_len=torch.zeros(1, dtype=torch.int32, device=device),
        slot_ids=torch.zeros(1, dtype=torch.int32, device=device),
        page_table=torch.arange(-(-tokens // 256), dtype=torch.int32, device=device)[None],
        logits_rows=places[-1:], token_request=torch.zeros_like(places, dtype=torch.int32), one_token_each=False,
    )  # fmt: skip
    return ForwardContext(token_ids=places, index=batch.index(256), dtype=torch.bfloat16, simulate=True)


def run_rank(rank: int, ranks: int, port: int, tokens: int, parts: list[int], sums: list[str]) -> Times:
    """Runs in a process of its own."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = RankGroup(
        rank, ranks, host="127.0.0.1", meeting=f"127.0.0.1:{port}", device=device, timeout_s=TIMEOUT_S, terms={}
    )
    try:
        with torch.inference_mode():
            return measure(group, tokens, parts, sums)
    finally:
        group.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of each rank")
    parser.add_argument("--parts", default="1,2,4")
    parser.add_argument("--sums", default="float32,bfloat16", help="how partial sums travel")
    options = parser.parse_args()
    ranks, parts, sums = torch.cuda.device_count(), [int(n) for n in options.parts.split(",")], options.sums.split(",")
    if not ranks:
        parser.error("a GPU for each rank is needed")
    results = on_every_rank(ranks, run_rank, options.tokens, parts, sums)
    alone, exchange = max(t.alone for t in results), max(t.exchange for t in results)
    print(f"{ranks} x {torch.cuda.get_device_name(0)}, {options.tokens} tokens a rank, one MoE sublayer\n")
    print("| what | ms | of the exchange hidden |\n|---|---|---|")
    print(f"| alone | {alone:.2f} | |\n| exchange | {exchange:.2f} | |")
    for name in results[0].in_parts:
        took = max(times.in_parts[name] for times in results)
        print(f"| {name} | {took:.2f} | {(alone + exchange - took) / exchange:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
