"""Every metric of the router, declared together."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.errors import RouteError
from router.nodes import Role
from router.registry import Registry
from router.transfers import TransferTable

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class RouterMetrics:
    """Counters and histograms. What they count is in their help texts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tandem_router_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"tandem_router_{name}", text, registry=registry, buckets=_SECONDS)

        self._requests = counter("requests", "Answers by path and status", "path", "status")
        self._children: dict[tuple[str, int], Counter] = {}
        self.seconds = histogram("request_seconds", "From the last byte of the request to the last of the answer")
        self.ttft = histogram("time_to_first_token_seconds", "From the last byte of the request to the first event")
        self.prefill_seconds = histogram("prefill_seconds", "From the start of the prefill leg to its answer")
        self.retries = counter("retries", "Legs that failed, by leg and step taken", "leg", "step")
        self.failures = counter("failures", "Requests that ended with an error of the router's, by code", "code")
        self.disconnects = counter("client_disconnects", "Requests whose client left before the end")
        self.broken_streams = counter("broken_streams", "Streams that ended with an error event in the middle")
        self.resumes = counter("resumes", "Streams that broke in the middle and were continued on another rank")
        self._ways = counter("path", "Good answers by the way their state took: handoff, local, recompute", "path")
        self.ways = {way: self._ways.labels(way.decode()) for way in (b"handoff", b"local", b"recompute")}
        self.canaries = counter("canaries", "Requests of the router's own, by outcome", "outcome")

    def answered(self, path: str, status: int) -> None:
        """Count one answer. `path` must be one of the routes, not whatever a client wrote."""
        child = self._children.get((path, status))
        if child is None:
            child = self._children[path, status] = self._requests.labels(path, str(status))
        child.inc()

    def failed(self, error: Exception) -> None:
        """Count one request that ended with an error the router made."""
        self.failures.labels(error.code if isinstance(error, RouteError) else "invalid_request").inc()


class ClusterCollector(Collector):
    """What is known of nodes and transfers, read when scraped."""

    def __init__(
        self,
        registry: Registry,
        transfers: TransferTable,
        live: Callable[[], set[int]],
        running: Callable[[], int],
        healthy: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._transfers = transfers
        self._live = live
        self._running = running
        self._healthy = healthy

    def collect(self) -> list[Metric]:
        nodes = GaugeMetricFamily("tandem_router_nodes", "Attached nodes", labels=["role", "state"])
        counts = {(role, state): 0 for role in Role for state in ("ready", "draining", "troubled")}
        in_flight = GaugeMetricFamily("tandem_router_legs_running", "Legs under way", labels=["node", "rank", "role"])
        for node in self._registry.nodes:
            role = node.info.role
            counts[role, node.state] = counts.get((role, node.state), 0) + 1
            for target in node.targets:
                in_flight.add_metric([node.info.node_id, str(target.info.rank), role.value], target.in_flight)
        for (role, state), count in counts.items():
            nodes.add_metric([role.value, state], count)
        table = self._transfers
        plain = (
            ("requests_running", "Requests being served", self._running()),
            ("transfers_open", "Transfers this router owns now", len(table)),
            ("transfers_stranded", "Open transfers without a request: always 0", len(table.stranded(self._live()))),
            ("transfer_oldest_seconds", "Age of the oldest open transfer", table.oldest_s()),
            ("healthy", "1 if the whole path was proven recently", float(self._healthy())),
        )
        families: list[Metric] = [nodes, in_flight]
        for name, text, value in plain:
            families.append(GaugeMetricFamily(f"tandem_router_{name}", text, value=value))
        totals = (
            ("transfers_opened", "Transfers made", table.opened),
            ("transfers_finished", "Transfers whose state arrived", table.finished),
            ("transfers_released", "Transfers given up", table.released),
            ("node_joins", "Nodes that joined", self._registry.joins),
            ("node_losses", "Nodes that left or were lost", self._registry.losses),
        )
        for name, text, value in totals:
            family = Metric(f"tandem_router_{name}", text, "counter")
            family.add_sample(f"tandem_router_{name}_total", {}, value)
            families.append(family)
        return families
