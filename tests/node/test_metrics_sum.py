"""The metrics of several processes, added up."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.backend import EngineInfo
from api.metrics import ApiMetrics
from node.engine_client import NodeEngineClient
from node.engine_link import EngineLink
from node.metrics_sum import sum_expositions
from runtime.channel import ChannelAddress
from runtime.histogram import REQUEST_SECONDS, HistogramCounts
from runtime.requests import EngineStats


def exposition(process: int) -> bytes:
    """What one process reports: its own requests, and the state of the rank as both know it."""
    registry = CollectorRegistry()
    info = EngineInfo(model_id="m", max_model_len=10, vocab_size=10, role="standalone", process=process)
    link = EngineLink(ChannelAddress("unused", 0, 2), process)
    metrics = ApiMetrics(NodeEngineClient(info, [link], lambda _: None, recompute=False), "m", registry)
    queue_time = HistogramCounts((1, 2, *[0] * (len(REQUEST_SECONDS) - 1)), total=0.5)
    link.receive(EngineStats(rank=0, running=5, generated_tokens=100, queue_time=queue_time))
    metrics.observe("time_to_first_token_seconds", 0, 0.02 * (process + 1))
    metrics.finished(0, "stop")
    metrics.http_requests.labels("GET", "/health" if process else "/metrics", "200").inc(3)
    Histogram("own_seconds", "h", buckets=(1.0,), registry=registry).observe(0.5 + process)
    Counter("same", "c", registry=registry).inc(2)
    return generate_latest(registry)


def test_counts_are_added_and_what_is_known_to_all_is_not() -> None:
    text = sum_expositions([exposition(0), exposition(1)]).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    values = {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def value(name: str, **labels: str) -> float:
        return values[name, frozenset(labels.items())]

    rank = {"model_name": "m", "engine": "0"}
    assert value("tandem_num_requests_running", **rank) == 5
    assert value("vllm:generation_tokens_total", **rank) == 100
    assert value("vllm:request_queue_time_seconds_sum", **rank) == 0.5
    assert value("tandem_request_queue_time_seconds_count", **rank) == 3
    assert value("tandem_request_success_total", **rank, finished_reason="stop") == 2
    assert value("vllm:time_to_first_token_seconds_count", **rank) == 2
    assert value("vllm:time_to_first_token_seconds_bucket", **rank, le="0.025") == 1
    assert value("tandem_time_to_first_token_seconds_sum", **rank) == 0.06
    for path in ("/health", "/metrics"):
        assert value("tandem_http_requests_total", method="GET", handler=path, status="200") == 3
    assert (value("own_seconds_bucket", le="1.0"), value("own_seconds_bucket", le="+Inf")) == (1, 2)
    assert value("same_total") == 4
    assert 1.5e9 < value("same_created") < 2.5e9


def test_one_part_is_left_as_it_is() -> None:
    families = [
        list(text_string_to_metric_families(part.decode()))
        for part in (exposition(0), sum_expositions([exposition(0)]))
    ]
    assert [family.name for family in families[0]] == [family.name for family in families[1]]
