"""Configuration and metrics of shared experts."""

import array

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from model.placement import Placement
from node.config import NodeConfig
from node.expert_load import ExpertLoadMetrics, total_expert_tokens
from runtime.requests import ExpertLoad


def node(**fields: object) -> NodeConfig:
    return msgspec.convert({"engine": {"model": "m"}, "enable_expert_parallel": True, **fields}, NodeConfig)


def test_a_group_is_the_ranks_of_the_node_unless_it_has_an_address():
    assert not msgspec.convert({"engine": {"model": "m"}, "data_parallel_size": 4}, NodeConfig).shares_experts
    assert not node().shares_experts
    alone = node(data_parallel_size=4)
    assert (alone.expert_ranks, alone.shares_experts, alone.group_host) == (4, True, "127.0.0.1")
    group = {"address": "head:29500", "ranks": 8, "first_rank": 4}
    part = node(data_parallel_size=4, host="0.0.0.0", advertise_host="b", expert_parallel=group)
    assert (part.expert_ranks, part.group_host) == (8, "b")
    assert node(expert_parallel={"address": "head:1", "ranks": 2}).shares_experts, "one rank of each of two nodes"


def test_all_ranks_together_bring_as_many_tokens_to_the_experts_unless_told_otherwise():
    assert [node().expert_parallel.part_tokens_for(size) for size in (2, 4, 8)] == [16_384, 8_192, 4_096]
    assert node(data_parallel_size=2, expert_parallel={"part_tokens": 24}).expert_parallel.part_tokens_for(4) == 24


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"enable_expert_parallel": False, "expert_parallel": {"part_tokens": 1}}, "needs enable_expert_parallel"),
        ({"expert_parallel": {"address": "here", "ranks": 2}}, "address='here' is not host:port"),
        ({"expert_parallel": {"address": "here:0", "ranks": 2}}, "address='here:0' is not host:port"),
        ({"expert_parallel": {"address": "here:1"}}, "address needs ranks"),
        ({"expert_parallel": {"ranks": 2}}, "need address"),
        ({"expert_parallel": {"first_rank": 2}}, "need address"),
        (
            {"data_parallel_size": 4, "expert_parallel": {"address": "h:1", "ranks": 8, "first_rank": 6}},
            "ranks 6..9 of this node do not fit into ranks=8",
        ),
        ({"expert_parallel": {"part_tokens": 0}}, "part_tokens=0 must be positive"),
        ({"expert_parallel": {"sums": "fp8"}}, "fp8"),
        (
            {"transfer": {"transport": "rdma", "devices_by_rank": [["a"], ["b"]]}},
            "transfer.devices_by_rank: 2 entries for data_parallel_size=1",
        ),
        ({"transfer": {"transport": "rdma", "devices_by_rank": [["a"]], "devices": ["b"]}}, "give one of them"),
        ({"transfer": {"devices_by_rank": [["a"]]}}, "need transport=rdma"),
    ],
)
def test_groups_that_cannot_be_are_refused_by_name(fields, words):
    with pytest.raises(msgspec.ValidationError) as caught:
        node(**fields)
    assert words in str(caught.value)


def test_every_rank_runs_with_its_own_devices():
    named = {"transport": "rdma", "devices_by_rank": [["mlx5_0", "mlx5_1"], []]}
    transfer = node(data_parallel_size=2, transfer=named).transfer
    assert [transfer.of_rank(rank).devices for rank in (0, 1)] == [("mlx5_0", "mlx5_1"), ()]
    assert node().transfer.of_rank(0) == node().transfer


def load(rank: int, *layers: list[int]) -> ExpertLoad:
    return ExpertLoad(rank, len(layers), b"".join(array.array("q", layer).tobytes() for layer in layers))


def test_counts_of_ranks_add_up_by_expert_and_by_rank_that_holds_it():
    loads = [load(0, [1, 2, 3], [4, 5, 6]), None, load(2, [10, 0, 0], [0, 0, 1 << 40])]
    assert total_expert_tokens(loads) == [[11, 2, 3], [4, 5, 6 + (1 << 40)]]
    assert total_expert_tokens([None]) == []
    for every_expert in (False, True):
        registry = CollectorRegistry()
        placement = Placement(3, 2, ((1, (1, 0, 0)),))
        ExpertLoadMetrics(registry, lambda: loads, placement, every_expert=every_expert)
        text = generate_latest(registry).decode()
        assert 'tandem_expert_rank_tokens_total{expert_rank="0",layer="0"} 11.0' in text
        assert 'tandem_expert_rank_tokens_total{expert_rank="1",layer="0"} 5.0' in text
        assert 'tandem_expert_rank_tokens_total{expert_rank="1",layer="1"} 4.0' in text
        assert ('tandem_expert_tokens_total{expert="0",layer="0"} 11.0' in text) is every_expert
