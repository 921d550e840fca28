"""What a node measures about hand-offs, in Prometheus terms. Requests and tokens are measured by `api.metrics`."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from runtime.requests import Handover

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class NodeMetrics:
    """The series of one node, declared together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._bytes = Counter("tandem_handoff_bytes", "State received from prefill ranks.", registry=registry)
        self._seconds = Histogram(
            "tandem_handoff_seconds",
            "First read submitted to last read ended, per request.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._exposed = Histogram(
            "tandem_handoff_exposed_seconds",
            "The part of the hand-off after prefill was ready: what a client waits for.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._wait = Histogram(
            "tandem_handoff_wait_seconds",
            "From the claim to the prefill's last chunk.",
            buckets=(*_SECONDS, 30.0, 60.0),
            registry=registry,
        )

    def on_handover(self, handover: Handover) -> None:
        self._bytes.inc(handover.num_bytes)
        self._seconds.observe(handover.transfer_s)
        self._exposed.observe(handover.exposed_s)
        self._wait.observe(handover.wait_s)
