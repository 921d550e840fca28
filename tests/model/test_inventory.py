"""The tensors that names and shapes alone imply, against the totals published for the released checkpoints."""

from __future__ import annotations

from collections import Counter

import pytest

from model.checkpoint import rank_bytes
from model.inventory import expert_of, inventory
from model.presets import flash, pro
from tools.inspect_checkpoint import tensor_class


@pytest.mark.parametrize(
    ("preset", "tensors", "total"), [(flash, 69_187, 159_609_485_896), (pro, 145_116, 864_704_792_696)]
)
def test_counts_and_bytes_equal_the_published_ones(preset, tensors: int, total: int) -> None:
    specs = list(inventory(preset()))
    assert len(specs) == len({spec.name for spec in specs}) == tensors
    assert sum(spec.num_bytes for spec in specs) == total


def test_dtypes_of_flash_equal_the_published_histogram() -> None:
    found = Counter(spec.dtype for spec in inventory(flash()))
    assert found == {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34167, "I64": 3, "I8": 33792}


def test_bytes_of_flash_by_class() -> None:
    sizes: Counter[tuple[str, bool]] = Counter()
    for spec in inventory(flash()):
        sizes[tensor_class(spec.name), spec.name.startswith("mtp.")] += spec.num_bytes
    assert sizes["routed experts", False] == 147_169_738_752
    assert sizes["routed experts", True] == 3_422_552_064
    assert sizes["attention", False] == 4_599_478_144
    assert sizes["attention", True] == 106_964_608
    assert sizes["compressors", False] == 525_722_624
    assert sizes["indexers", False] == 275_353_344
    assert sizes["shared experts", False] == 1_082_196_480
    assert sizes["router", False] == 108_834_816
    assert sizes["hyper-connections", False] == 135_537_756
    assert sizes["hyper-connections", True] == 3_408_108
    assert sizes["norms", False] == 712_704
    assert sizes["embedding and head", False] == 2 * 1_059_061_760
    assert sizes["MTP projections", True] == 33_556_480
    assert sum(size for (_, mtp), size in sizes.items() if not mtp) == 156_015_698_140


def test_bytes_of_single_layers_of_flash() -> None:
    sizes: Counter[str] = Counter()
    for spec in inventory(flash()):
        sizes[".".join(spec.name.split(".")[:2])] += spec.num_bytes
    assert [sizes[f"layers.{layer}"] for layer in (0, 2, 3, 4)] == [
        3_566_148_952,
        3_596_055_640,
        3_568_596_312,
        3_589_851_224,
    ]


def test_bytes_of_one_of_four_expert_parallel_ranks_of_flash() -> None:
    assert rank_bytes(flash(), range(64)) == 45_638_394_076


def test_experts_are_told_from_names() -> None:
    assert expert_of("layers.3.ffn.experts.17.w2.scale") == 17
    assert expert_of("mtp.0.ffn.experts.0.w1.weight") == 0
    assert expert_of("layers.3.ffn.shared_experts.w2.scale") is None
    assert expert_of("layers.3.ffn.gate.weight") is None
