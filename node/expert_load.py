"""What a node knows of the load of its experts: counters of its ranks' tokens, for Prometheus and for placing experts.

Each node counts the tokens of its own requests; the sum over the nodes of a group is the load of the group.
"""

from __future__ import annotations

import array
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from model.config import ModelConfig
from model.placement import Placement
from node.config import NodeConfig
from node.engine_process import EngineProcess
from runtime.requests import ExpertLoad


def total_expert_tokens(loads: Iterable[ExpertLoad | None]) -> list[list[int]]:
    """Tokens per layer and expert, summed over ranks; empty before the first report."""
    summed: list[list[int]] = []
    for load in loads:
        if load is None:
            continue
        counts = array.array("q", load.counts)
        width = len(counts) // load.num_layers
        rows = [counts[start : start + width] for start in range(0, len(counts), width)]
        if not summed:
            summed = [list(row) for row in rows]
        else:
            for row, more in zip(summed, rows, strict=True):
                row[:] = map(operator.add, row, more)
    return summed


class ExpertLoadMetrics(Collector):
    """The series, made from the newest counters when they are scraped."""

    def __init__(
        self,
        registry: CollectorRegistry,
        loads: Callable[[], Sequence[ExpertLoad | None]],
        placement: Placement,
        *,
        every_expert: bool,
    ) -> None:
        """loads: the newest counters of each rank. every_expert: export them by expert too, which is many series."""
        self._loads = loads
        self._placement = placement
        self._every_expert = every_expert
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        by_rank = CounterMetricFamily(
            "tandem_expert_rank_tokens",
            "Tokens that chose an expert of this rank of the group, each as often as it chose one.",
            labels=("layer", "expert_rank"),
        )
        by_expert = CounterMetricFamily(
            "tandem_expert_tokens", "Tokens that chose this expert.", labels=("layer", "expert")
        )
        for layer, counts in enumerate(total_expert_tokens(self._loads())):
            sums = [0] * self._placement.size
            for rank, count in zip(self._placement.ranks_of(layer), counts, strict=True):
                sums[rank] += count
            for rank, tokens in enumerate(sums):
                by_rank.add_metric((str(layer), str(rank)), tokens)
            if self._every_expert:
                for expert, tokens in enumerate(counts):
                    by_expert.add_metric((str(layer), str(expert)), tokens)
        yield by_rank
        yield by_expert


def watch_experts(config: NodeConfig, registry: CollectorRegistry, engines: Sequence[EngineProcess]) -> None:
    """Export the counters, if the ranks keep them."""
    if config.expert_parallel.load_counters != "off":
        ExpertLoadMetrics(
            registry,
            lambda: [engine.expert_load for engine in engines],
            config.expert_parallel.placement_for(ModelConfig.load(config.engine.model), config.expert_ranks),
            every_expert=config.expert_parallel.load_counters == "experts",
        )
