"""Experts packed one matrix at a time, in any order, equal those packed together."""

import math

import pytest
import torch

from kernels.packed_experts import PackedBank, pack_bank, unpack_values
from kernels.quantize import quantize_fp4
from model.config import EXPERT_GROUP
from model.linear import ExpertBank, Numerics
from model.presets import tiny

CONFIG = tiny()
EXPERTS = range(2, 5)


HOW = Numerics(torch.bfloat16, True, True, torch.device("cpu"))


def banks():
    return ExpertBank(CONFIG, EXPERTS, HOW), ExpertBank(CONFIG, EXPERTS, HOW, hopper=True)


def matrices(generator):
    hidden, width = CONFIG.hidden_size, CONFIG.moe_intermediate_size
    for expert in EXPERTS:
        for matrix, shape in (("w1", (width, hidden)), ("w2", (hidden, width)), ("w3", (width, hidden))):
            codes, scales = quantize_fp4(torch.randn(shape, generator=generator), EXPERT_GROUP)
            yield expert, matrix, codes.view(torch.int8), scales.view(torch.float8_e8m0fnu)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_bank_filled_matrix_by_matrix_is_the_bank_packed_at_once(backwards):
    plain, packed = banks()
    loads = list(matrices(torch.Generator().manual_seed(0)))
    for expert, matrix, codes, scales in reversed(loads) if backwards else loads:
        plain.holder(expert, matrix).load(codes, scales)
        packed.holder(expert, matrix).load(codes, scales)
    wanted, got = pack_bank(plain.weights), packed.weights
    assert isinstance(got, PackedBank)
    assert got.first == EXPERTS.start
    for one, other in ((got.up, wanted.up), (got.down, wanted.down)):
        assert torch.equal(one.data, other.data)
        assert torch.equal(one.row_scale, other.row_scale)
    assert not packed._hopper._waiting, "nothing is kept of what was packed"


def test_only_quantised_experts_are_packed():
    _, packed = banks()
    with pytest.raises(ValueError, match="quantised ones only"):
        packed.holder(2, "w2").load(torch.zeros(4, 4), None)


def test_drawn_experts_are_finite_seeded_and_of_unit_gain():
    plain, packed = banks()
    again = banks()[1]
    assert not plain.fill_random("experts", 3), "the checkpoint's layout is left to the holders"
    for bank in (packed, again):
        assert bank.fill_random("experts", 3)
    for matrix, other in ((packed.weights.up, again.weights.up), (packed.weights.down, again.weights.down)):
        assert torch.equal(matrix.data, other.data)
        values = unpack_values(matrix)
        assert values.isfinite().all()
        gain = float(values.std()) * math.sqrt(values.shape[-1])
        assert 0.6 < gain < 1.6
        assert not torch.equal(values[0], values[1])


def test_a_drawn_expert_is_the_same_on_whatever_rank_it_is():
    whole = banks()[1]
    part = ExpertBank(CONFIG, EXPERTS[1:], HOW, hopper=True)
    for bank in (whole, part):
        assert bank.fill_random("layers.3.ffn.experts", 3)
    for matrix in ("up", "down"):
        all_data, some = getattr(whole.weights, matrix).data, getattr(part.weights, matrix).data
        assert torch.equal(all_data[1:], some)
        assert not torch.equal(all_data[0], some[0])
