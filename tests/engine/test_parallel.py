"""Ranks that share a model: the tokens are those of one rank that has it all."""

import itertools
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.expert_exchange import ExpertExchange, parts_of
from engine.head_exchange import HeadExchange
from engine.loader import Sharing, load_rank
from kernels.exchange_rows import QuantizedTokens
from model.config import ModelConfig
from model.placement import Placement
from runtime.requests import SamplingParams, StepOutput, Submit
from tests.engine.ranks import Rank, run_ranks


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 900, length).tolist() for length in (5, 40, 17, 64, 3, 33)]


def request(index: int, prompt: list[int]) -> Submit:
    sampling = SamplingParams(max_tokens=4 + 3 * index, temperature=0.0, ignore_eos=True)
    return Submit(request_id=f"r{index}", prompt_ids=tuple(prompt), sampling=sampling)


def collect(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for message in engine.step():
        assert isinstance(message, StepOutput), message
        for output in message.outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)


def engine_config(checkpoint: Path, **changed: object) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint), device="cpu", numerics="plain", block_size=32, num_pages=30, max_num_seqs=4,
        max_num_batched_tokens=32, **changed,
    )  # fmt: skip


# As on a GPU: decode steps of a few fixed sizes, and a step launched before the last one is collected.
AS_ON_A_GPU = {"cudagraph_capture_sizes": (1, 4), "async_scheduling": "on"}


@dataclass(frozen=True)
class Outcome:
    tokens: dict[str, list[int]]
    steps: int
    counts: torch.Tensor
    """[layers, experts]: how many tokens chose each."""


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path) -> Outcome:
    """What one rank with all experts says."""
    config = engine_config(tiny_checkpoint)
    loaded = load_rank(config, holds_states=False, count_experts=True, progress=False)
    engine = Engine(loaded.config, loaded.shape, loaded.forward)
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts()):
        engine.submit(request(index, prompt))
    while engine.has_work:
        collect(engine, tokens)
    return Outcome(tokens, engine.stats().steps, loaded.model.expert_counts[:, :-1])


def together(
    config: EngineConfig, size: int, *, part_tokens: int = 4096, placement: Placement | None = None, head: bool = False
) -> Outcome:
    """What `size` ranks say that share the experts. The last rank gets no requests."""
    model_config = ModelConfig.load(Path(config.model))
    shares = placement or Placement.even(model_config.n_routed_experts, size)
    reports = itertools.count()
    all_reported = threading.Event()

    def body(rank: Rank) -> Outcome:
        exchange = ExpertExchange(
            rank.group, rank.lockstep, num_experts=model_config.n_routed_experts,
            quantised=config.numerics == "released", part_tokens=part_tokens,
        )  # fmt: skip
        sharing = Sharing(
            shares.share(rank.rank),
            exchange,
            HeadExchange(rank.group, rank.lockstep) if head else None,
            lambda value: rank.group.least(value, 60),
        )
        loaded = load_rank(config, holds_states=False, sharing=sharing, count_experts=True, progress=False)
        engine = Engine(loaded.config, loaded.shape, loaded.features, head=loaded.model.logits, parallel=rank.lockstep)
        tokens: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts()):
            if index % (size - 1) == rank.rank:
                engine.submit(request(index, prompt))
        deadline = time.monotonic() + 100
        reported = False
        while not all_reported.is_set():
            assert time.monotonic() < deadline, f"rank {rank.rank} stalled"
            if engine.has_work:
                collect(engine, tokens)
            elif not reported:
                reported = True
                if next(reports) == size - 1:
                    all_reported.set()
            else:
                rank.sleep()
        engine.check_integrity()
        return Outcome(tokens, engine.stats().steps, loaded.model.expert_counts[:, :-1])

    results = run_ranks(size, body)
    assert len({result.steps for result in results}) == 1, "every rank takes part in every step"
    assert not results[-1].tokens
    tokens = {request_id: ids for result in results for request_id, ids in result.tokens.items()}
    return Outcome(tokens, results[0].steps, torch.stack([result.counts for result in results]).sum(0))


@pytest.mark.parametrize(
    ("size", "part_tokens", "changed"), [(2, 4096, {}), (4, 7, {}), (2, 7, AS_ON_A_GPU)], ids=["2", "4", "2, padded"]
)
def test_data_and_expert_parallel_ranks_give_the_tokens_of_one_rank(tiny_checkpoint, alone, size, part_tokens, changed):
    got = together(engine_config(tiny_checkpoint, **changed), size, part_tokens=part_tokens)
    assert got.tokens == alone.tokens
    assert torch.equal(got.counts, alone.counts), "every choice of an expert is counted once, by the token's rank"
    assert alone.counts.sum() > 0


def test_experts_may_lie_anywhere_and_the_head_be_shared(tiny_checkpoint, alone, tmp_path):
    model_config = ModelConfig.load(tiny_checkpoint)
    rng = np.random.default_rng(5)
    layers = {}
    for layer in range(0, model_config.num_hidden_layers, 2):
        ranks = [0, 1, 2, *rng.integers(0, 3, model_config.n_routed_experts - 3).tolist()]
        layers[str(layer)] = rng.permutation(ranks).tolist()
    path = tmp_path / "placement.json"
    path.write_text(json.dumps({"ranks": 3, "layers": layers}))
    placement = Placement.load(path, model_config, 3)
    got = together(engine_config(tiny_checkpoint), 3, placement=placement, head=True)
    assert got.tokens == alone.tokens
    assert torch.equal(got.counts, alone.counts)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("part_tokens", [3, 100])
def test_a_token_gets_the_sum_over_the_experts_of_all_ranks(quantised, part_tokens):
    """Experts that multiply by powers of two: sums are exact, and rows of other ranks or of padding would show."""
    size, hidden, topk, num_experts = 3, 160, 2, 6
    counts = [4, 0, 9]

    def body(rank: Rank) -> None:
        count = counts[rank.rank]
        assert rank.agree(count, decode_only=False).num_tokens == tuple(counts)
        exchange = ExpertExchange(
            rank.group, rank.lockstep, num_experts=num_experts, quantised=quantised, part_tokens=part_tokens
        )
        generator = torch.Generator().manual_seed(rank.rank)
        x = torch.randint(-8, 9, (count, hidden), generator=generator).float()
        experts = torch.stack(
            [torch.randperm(num_experts, generator=generator)[:topk] for _ in range(count)]
            or [torch.zeros(0, topk, dtype=torch.int64)]
        ).reshape(count, topk)
        weights = torch.randint(1, 5, (count, topk), generator=generator).float()

        def compute(x_UD, experts_UK, weights_UK, dtype):
            if isinstance(x_UD, QuantizedTokens):
                x_UD = x_UD.values()
            mine = (experts_UK // 2 == rank.rank) & (experts_UK < num_experts)
            factor = (torch.where(mine, weights_UK * 2.0**experts_UK, 0.0)).sum(1, keepdim=True)
            return (x_UD * factor).to(dtype)

        shared = torch.randint(-8, 9, (count, hidden), generator=generator).float()
        got = exchange.send(x, experts, weights).through(compute, shared)
        expected = x * (weights * 2.0**experts).sum(1, keepdim=True) + shared
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)

    run_ranks(size, body)


def test_sums_do_not_depend_on_how_many_tokens_travel_together():
    size, hidden = 4, 96
    x = torch.randn(7, hidden, generator=torch.Generator().manual_seed(0))
    seen: dict[int, list[torch.Tensor]] = {}

    def body(rank: Rank) -> None:
        def compute(x_UD, _, __, dtype):
            return (x_UD * (0.1 + rank.rank / 3)).to(dtype)

        for count in (7, 1, 3):
            rank.agree(count)
            exchange = ExpertExchange(rank.group, rank.lockstep, num_experts=8, quantised=False, part_tokens=100)
            routing = torch.zeros(count, 2)
            sums = exchange.send(x[:count], routing.long(), routing).through(compute, torch.zeros(count, hidden))
            if rank.rank == 0:
                seen[count] = list(sums)

    run_ranks(size, body)
    assert torch.equal(seen[1][0], seen[7][0])
    assert torch.equal(torch.stack(seen[3]), torch.stack(seen[7][:3]))


@pytest.mark.parametrize(("rows", "part"), [(0, 4), (1, 4), (4, 4), (5, 4), (8, 4), (9, 4), (16384, 4096)])
def test_parts_cover_a_step_evenly(rows, part):
    parts = parts_of(rows, part)
    assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == rows
    sizes = [end - begin for begin, end in parts]
    assert max(sizes) <= part
    assert max(sizes) - min(sizes) <= 1
