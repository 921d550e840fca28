"""What the HTTP surface measures, declared together.

Every series exists twice: as `tandem_<name>` and under the `vllm:<name>` that dashboards and routers look for, with the
labels `model_name` and `engine` (the data-parallel rank). Gauges and totals of the engine are read from its last
snapshot when they are scraped, so they are there from the first scrape on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from api.backend import EngineClient
from runtime.histogram import REQUEST_SECONDS, STEP_TOKENS, Histogram, HistogramCounts, cumulative
from runtime.requests import EngineStats

PREFIXES = ("tandem_", "vllm:")

_SHORT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 1e2, 2e2, 5e2, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token.", REQUEST_SECONDS),
    "inter_token_latency_seconds": ("Between two steps that brought tokens of one request.", _SHORT),
    "request_time_per_output_token_seconds": ("Mean time per token after the first, per request.", _SHORT),
    "e2e_request_latency_seconds": ("From the request's arrival to its last token.", REQUEST_SECONDS),
    "request_decode_time_seconds": ("From the first to the last token.", REQUEST_SECONDS),
    "request_prompt_tokens": ("Prompt tokens per request.", _TOKENS),
    "request_generation_tokens": ("Generated tokens per request.", _TOKENS),
    "request_params_max_tokens": ("Tokens a request was allowed to generate.", _TOKENS),
    "request_params_n": ("Choices asked for per request.", _CHOICES),
}

GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests in the running batch.", lambda s: s.running),
    "num_requests_waiting": ("Requests waiting to be computed.", lambda s: s.waiting + s.receiving),
    "num_requests_receiving": ("Requests whose state is on its way here.", lambda s: s.receiving),
    "num_requests_held": ("Finished prefills whose state waits to be fetched.", lambda s: s.held),
    "queued_prompt_tokens": ("Prompt tokens waiting to be computed.", lambda s: s.queued_prompt_tokens),
    "kv_cache_usage_perc": (
        "Share of the pages in use, 1 means all.",
        lambda s: 1.0 - s.pages_free / s.pages_total if s.pages_total else 0.0,
    ),
    "pages": ("Pages of the pool.", lambda s: s.pages_total),
    "pages_free": ("Pages that nothing holds.", lambda s: s.pages_free),
    "pages_quarantined": ("Pages waiting for an unfinished read to end.", lambda s: s.pages_quarantined),
    "transfer_reads_in_flight": ("Reads under way.", lambda s: s.transfer.reads_in_flight if s.transfer else 0),
    "transfer_oldest_read_seconds": (
        "Age of the oldest read under way.",
        lambda s: s.transfer.oldest_read_s if s.transfer else 0.0,
    ),
    "transfer_peers": ("Open streams to other ranks.", lambda s: s.transfer.peers if s.transfer else 0),
    "slots": ("Slots of the pool.", lambda s: s.slots_total),
    "slots_free": ("Slots that nothing holds.", lambda s: s.slots_free),
}

COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": ("Prompt tokens computed.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.generated_tokens),
    "num_preemptions": ("Requests put back because pages ran out.", lambda s: s.preemptions),
    "engine_steps": ("Steps of the engine.", lambda s: s.steps),
    "transfers_sent": ("States handed over to another rank.", lambda s: s.transfers_sent),
    "transfers_received": ("States received from another rank.", lambda s: s.transfers_received),
    "transfers_failed": ("States that did not arrive.", lambda s: s.transfers_failed),
    "requests_recomputed": ("Requests computed again after a failed transfer.", lambda s: s.recomputed),
    "received_bytes": ("Bytes of state received.", lambda s: s.bytes_received),
    "transfer_reads": ("Reads of state that ended well.", lambda s: s.transfer.reads_done if s.transfer else 0),
    "transfer_reads_failed": (
        "Reads of state that failed; the transfer may have been tried again.",
        lambda s: s.transfer.reads_failed if s.transfer else 0,
    ),
    "transfer_claims_refused": (
        "Claims of other ranks that were refused.",
        lambda s: s.transfer.claims_refused if s.transfer else 0,
    ),
    "transfer_leases_lapsed": (
        "Reads discarded because they ended after their lease.",
        lambda s: s.transfer.leases_lapsed if s.transfer else 0,
    ),
    "transfer_sends_expired": (
        "States given up because nobody fetched them in time.",
        lambda s: s.transfer.sends_ended.get("expired", 0) if s.transfer else 0,
    ),
    "transfer_sends_released": (
        "States given up because their router said so.",
        lambda s: s.transfer.sends_ended.get("released", 0) if s.transfer else 0,
    ),
    "transfer_engine_recreations": (
        "Times the transfer engine was made anew.",
        lambda s: s.transfer.recreations if s.transfer else 0,
    ),
    "external_prefix_cache_queries": (
        "Prompt tokens whose state was to come from elsewhere.",
        lambda s: s.tokens_asked_for,
    ),
    "external_prefix_cache_hits": ("Prompt tokens whose state was received.", lambda s: s.tokens_received),
}

ENGINE_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...], Callable[[EngineStats], HistogramCounts]]] = {
    "request_queue_time_seconds": ("From a request's arrival in the engine to its turn.", REQUEST_SECONDS,
                                   lambda s: s.queue_time),
    "request_prefill_time_seconds": ("From a request's turn to its first token.", REQUEST_SECONDS,
                                     lambda s: s.prefill_time),
    "request_inference_time_seconds": ("From a request's turn to its end.", REQUEST_SECONDS,
                                       lambda s: s.inference_time),
    "iteration_tokens_total": ("Tokens computed per step.", STEP_TOKENS, lambda s: s.step_tokens),
}  # fmt: skip


class ApiMetrics(Collector):
    """Owner of every series above, registered once per process."""

    def __init__(self, engine: EngineClient, model_name: str, registry: CollectorRegistry) -> None:
        self._engine = engine
        self._model_name = model_name
        self._num_ranks = engine.info.num_ranks
        self._histograms = {
            name: [Histogram(bounds) for _ in range(self._num_ranks)] for name, (_, bounds) in HISTOGRAMS.items()
        }
        self._finished: list[dict[str, int]] = [{"stop": 0, "length": 0, "abort": 0} for _ in range(self._num_ranks)]
        self._cached = [0] * self._num_ranks
        self._queried = [0] * self._num_ranks
        self.http_requests = Counter(
            "tandem_http_requests", "HTTP requests answered.", ["method", "handler", "status"], registry=registry
        )
        self.http_in_flight = 0
        registry.register(self)

    def observe(self, name: str, rank: int, value: float) -> None:
        self._histograms[name][rank].observe(value)

    def inter_token(self, rank: int) -> Histogram:
        """Of the gaps between tokens: observed so often that looking it up each time costs."""
        return self._histograms["inter_token_latency_seconds"][rank]

    def finished(self, rank: int, reason: str) -> None:
        """A choice ended: "stop", "length" or "abort" (client gone or engine failure)."""
        counts = self._finished[rank]
        counts[reason] = counts.get(reason, 0) + 1

    def prompt(self, rank: int, num_prompt: int, num_cached: int) -> None:
        """A prompt of `num_prompt` tokens, `num_cached` of them with reused state."""
        self._queried[rank] += num_prompt
        self._cached[rank] += num_cached

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.ranks()
        for prefix in PREFIXES:
            yield from self._engine_families(prefix, stats)
            yield from self._request_families(prefix)
        in_flight = GaugeMetricFamily("tandem_http_requests_in_flight", "HTTP requests being answered.")
        in_flight.add_metric([], self.http_in_flight)
        yield in_flight

    def _engine_families(self, prefix: str, stats: Sequence[EngineStats]) -> Iterator[Metric]:
        for name, (help_text, read) in GAUGES.items():
            gauge = GaugeMetricFamily(prefix + name, help_text, labels=["model_name", "engine"])
            for rank in stats:
                gauge.add_metric([self._model_name, str(rank.rank)], read(rank))
            yield gauge
        for name, (help_text, read) in COUNTERS.items():
            counter = CounterMetricFamily(prefix + name, help_text, labels=["model_name", "engine"])
            for rank in stats:
                counter.add_metric([self._model_name, str(rank.rank)], read(rank))
            yield counter
        for name, (help_text, bounds, counts_of) in ENGINE_HISTOGRAMS.items():
            histogram = HistogramMetricFamily(prefix + name, help_text, labels=["model_name", "engine"])
            for rank in stats:
                counts = counts_of(rank)
                histogram.add_metric([self._model_name, str(rank.rank)], cumulative(bounds, counts), counts.total)
            yield histogram
        config = GaugeMetricFamily(
            prefix + "cache_config_info",
            "How the pages are set up; always 1.",
            labels=["model_name", "engine", "block_size", "num_gpu_blocks"],
        )
        for rank in stats:
            labels = [self._model_name, str(rank.rank), str(self._engine.info.block_size), str(rank.pages_total)]
            config.add_metric(labels, 1)
        yield config

    def _request_families(self, prefix: str) -> Iterator[Metric]:
        for name, (help_text, bounds) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(prefix + name, help_text, labels=["model_name", "engine"])
            for rank, measured in enumerate(self._histograms[name]):
                taken = measured.counts()
                histogram.add_metric([self._model_name, str(rank)], cumulative(bounds, taken), taken.total)
            yield histogram
        success = CounterMetricFamily(
            prefix + "request_success", "Choices that ended.", labels=["model_name", "engine", "finished_reason"]
        )
        for rank, counts in enumerate(self._finished):
            for reason, count in counts.items():
                success.add_metric([self._model_name, str(rank), reason], count)
        yield success
        for name, help_text, values in (
            ("prefix_cache_queries", "Prompt tokens looked up for reusable state.", self._queried),
            ("prefix_cache_hits", "Prompt tokens whose state was reused.", self._cached),
            ("prompt_tokens_cached", "Prompt tokens whose state was reused.", self._cached),
        ):
            counter = CounterMetricFamily(prefix + name, help_text, labels=["model_name", "engine"])
            for rank, value in enumerate(values):
                counter.add_metric([self._model_name, str(rank)], value)
            yield counter


class RequestTimer:
    """The times and counts of one choice, from its arrival to its end."""

    __slots__ = ("_arrived", "_first", "_gaps", "_last", "_metrics", "_num_tokens", "_rank")

    def __init__(self, metrics: ApiMetrics, rank: int, arrived: float) -> None:
        self._metrics = metrics
        self._gaps = metrics.inter_token(rank)
        self._rank = rank
        self._arrived = arrived
        self._first = self._last = 0.0
        self._num_tokens = 0

    def tokens(self, count: int, now: float) -> None:
        """`count` tokens arrived at `now` (event loop time)."""
        if self._num_tokens:
            self._gaps.observe(now - self._last)
        else:
            self._first = now
            self._metrics.observe("time_to_first_token_seconds", self._rank, now - self._arrived)
        self._last = now
        self._num_tokens += count

    def timed(self, count: int, last: float) -> None:
        """`count` more tokens arrived, the last of them at `last`, and their gaps have been observed already."""
        self._last = last
        self._num_tokens += count

    def end(self, reason: str, num_prompt: int, num_cached: int) -> None:
        """The choice ended after the last `tokens`."""
        metrics, rank = self._metrics, self._rank
        metrics.finished(rank, reason)
        if not self._num_tokens:
            return
        metrics.prompt(rank, num_prompt, num_cached)
        metrics.observe("e2e_request_latency_seconds", rank, self._last - self._arrived)
        metrics.observe("request_decode_time_seconds", rank, self._last - self._first)
        metrics.observe("request_prompt_tokens", rank, num_prompt)
        metrics.observe("request_generation_tokens", rank, self._num_tokens)
        if self._num_tokens > 1:
            per_token = (self._last - self._first) / (self._num_tokens - 1)
            metrics.observe("request_time_per_output_token_seconds", rank, per_token)
