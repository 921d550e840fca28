"""The network as a whole: numerics that must not depend on formats, experts split over ranks, refused options."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.moe import ExpertCompute
from model.state import StateViews
from model.state_layout import build_state_layout
from model.transformer import Transformer
from tests.model.helpers import Request, batch_of, pools, random_model, random_weights, run, small_config, step

TOKENS = torch.randint(160, (140,), generator=torch.Generator().manual_seed(3)).tolist()
CHUNKS = [50, 1, 1, 33, 1, 1, 40]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return small_config()


@pytest.mark.parametrize("formats", [("fp8", "bf16"), ("bf16", "mxfp4"), ("fp8", "mxfp4")])
def test_packed_state_loses_nothing_of_the_released_numerics(config: ModelConfig, formats: tuple[str, str]) -> None:
    """A simulated row or key is exact in its packed form, so every bit of every logit is that of bfloat16 state."""
    model = random_model(config, numerics="released", dtype=torch.bfloat16)
    reference = run(model, pools(config, "bf16", "bf16").views, Request(0, [1]), TOKENS, CHUNKS)
    packed = run(model, pools(config, *formats).views, Request(2, [5]), TOKENS, CHUNKS)
    assert torch.equal(packed, reference)


def test_released_numerics_stay_near_the_plain_ones(config: ModelConfig) -> None:
    """Rounding moves logits, but does not replace them: a wrong scale or order would leave nothing in common."""
    plain = run(random_model(config), pools(config).views, Request(0, [1]), TOKENS, [140])
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(config, numerics="released", dtype=dtype)
        released = run(model, pools(config, "fp8", "mxfp4").views, Request(0, [1]), TOKENS, [140])
        assert not torch.equal(released, plain)
        similarity = torch.nn.functional.cosine_similarity(released, plain, dim=-1)
        assert similarity.median() > 0.97


def test_an_output_projection_in_fp8_stays_near_the_released_one(config: ModelConfig) -> None:
    logits = [
        run(random_model(config, numerics="released", fp8_output=fp8), pools(config, "fp8", "mxfp4").views,
            Request(0, [1]), TOKENS, [140])
        for fp8 in (False, True)
    ]  # fmt: skip
    assert not torch.equal(*logits)
    assert torch.nn.functional.cosine_similarity(*logits, dim=-1).median() > 0.97


def test_bfloat16_stays_near_float32(config: ModelConfig) -> None:
    wide = run(random_model(config), pools(config).views, Request(0, [1]), TOKENS, [140])
    model = random_model(config, dtype=torch.bfloat16)
    narrow = run(model, pools(config, "bf16", "bf16").views, Request(0, [1]), TOKENS, [140])
    assert narrow.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(narrow, wide, dim=-1).median() > 0.99


class LockstepRanks:
    """Two ranks in one process: each layer's routed sums are computed for both and added, as an exchange would."""

    def __init__(self) -> None:
        self.partials: list[list[Tensor]] = [[], []]

    def of(self, rank: int) -> LockstepRank:
        return LockstepRank(self, rank)


class LockstepRank:
    def __init__(self, ranks: LockstepRanks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def send(self, x: Tensor, experts: Tensor, weights: Tensor) -> LockstepRank:
        self.sent = (x, experts, weights)
        return self

    def through(self, compute: ExpertCompute, shared: Tensor) -> Tensor:
        partial = compute(*self.sent)
        self.ranks.partials[self.rank].append(partial)
        return partial + shared


def load(model: Transformer, weights: dict[str, Tensor]) -> Transformer:
    for name, holder in model.holders().items():
        holder.load(weights[name], None)
    return model


def test_ranks_with_parts_of_the_experts_add_up_to_the_whole(config: ModelConfig) -> None:
    """The first layer's input is the same everywhere, so the ranks' sums there must add up to the single rank's."""
    one_layer = small_config(num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=0)
    weights, ranks = random_weights(one_layer, 0), LockstepRanks()
    for rank, experts in enumerate((range(5), range(5, 8))):
        model = load(Transformer(one_layer, experts=experts, expert_parallel=ranks.of(rank)), weights)
        assert not {n for n in model.holders() if ".experts." in n and int(n.split(".")[4]) not in experts}
        step(model, pools(one_layer).views, [(Request(0, [1]), TOKENS)])
    alone = LockstepRanks()
    whole = load(Transformer(one_layer, expert_parallel=alone.of(0)), weights)
    step(whole, pools(one_layer).views, [(Request(0, [1]), TOKENS)])
    added = ranks.partials[0][0] + ranks.partials[1][0]
    assert torch.allclose(added, alone.partials[0][0], atol=1e-5)
    assert ranks.partials[0][0].abs().max() > 0.1
    assert ranks.partials[1][0].abs().max() > 0.1


def test_a_rank_without_tokens_takes_part_in_every_exchange(config: ModelConfig) -> None:
    class OthersTokens:
        """Peers always bring three tokens."""

        def __init__(self) -> None:
            self.calls: list[str] = []

        def send(self, x: Tensor, experts: Tensor, weights: Tensor) -> OthersTokens:
            self.calls.append("send")
            self.arrived = (
                torch.cat((x, torch.ones(3, x.shape[1], dtype=x.dtype))),
                torch.cat((experts, torch.tensor([[0, 1], [2, 3], [4, 1]]))),
                torch.cat((weights, torch.ones(3, 2))),
            )
            return self

        def through(self, compute: ExpertCompute, shared: Tensor) -> Tensor:
            self.calls.append("through")
            partial = compute(*self.arrived)
            assert partial[-3:].abs().max() > 0
            return partial[:-3] + shared

    peers = OthersTokens()
    model = random_model(config, expert_parallel=peers)
    assert model.forward(batch_of([]), pools(config).views).shape == (0, 160)
    assert peers.calls == ["send", "through"] * config.num_hidden_layers


def test_logits_are_of_the_rows_asked_for(config: ModelConfig) -> None:
    model = random_model(config)
    parts: Sequence[tuple[Request, list[int]]] = [(Request(0, [1]), TOKENS[:9]), (Request(1, [2]), TOKENS[:1])]
    every = model.forward(batch_of(parts), pools(config).views)
    last = model.forward(batch_of(parts, all_logits=False), pools(config).views)
    assert torch.equal(last, every[[8, 9]])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"experts": range(0, 8, 2)}, "contiguous"),
        ({"experts": range(4, 9)}, "8"),
        ({"experts": range(3, 3)}, "contiguous"),
        ({"experts": range(4)}, "expert_parallel"),
        ({"packed_weights": True}, "packed_weights"),
        ({"fp8_output": True}, "fp8_output"),
    ],
)
def test_options_that_make_no_sense_are_refused(config: ModelConfig, options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Transformer(config, **options)


@pytest.mark.parametrize("change", ["dtype", "width", "stride", "dims"])
def test_pools_of_another_shape_are_refused(config: ModelConfig, change: str) -> None:
    layout = build_state_layout(config, row_format="bf16", index_format="bf16")
    pages, slots = (
        torch.zeros(4, layout.page_bytes, dtype=torch.uint8),
        torch.zeros(2, layout.slot_bytes, dtype=torch.uint8),
    )
    wrong = {"dtype": slots.to(torch.int8), "width": slots[:, :-1].clone(), "stride": slots[:, :-1], "dims": slots[0]}
    with pytest.raises(ValueError, match="slots"):
        StateViews(layout, pages, wrong[change])


def test_two_models_of_one_process_do_not_share_anything(config: ModelConfig) -> None:
    first, second = random_model(config, 0), random_model(config, 1)
    before = run(first, pools(config).views, Request(0, [1]), TOKENS[:40], [40])
    run(second, pools(config).views, Request(0, [1]), TOKENS[:40], [40])
    assert torch.equal(run(first, pools(config).views, Request(0, [1]), TOKENS[:40], [40]), before)
