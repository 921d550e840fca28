"""The load generator against a real server on loopback, and its arithmetic on records with known answers."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import orjson
import pytest

from runtime.errors import ConfigError
from tests.tools.openai_server import OpenAIServer
from tools.bench import bench, jobs_of, parse_slo, parser
from tools.bench_client import Record
from tools.bench_report import percentile, summarise, table
from tools.bench_workload import arrivals, lognormal_lengths


@pytest.fixture
async def server() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer().serving() as server:
        yield server


def options_for(server: OpenAIServer, *words: str) -> list[str]:
    return ["--url", server.url, "--num-prompts", "6", "--input-len", "40", "--output-len", "5", *words]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_a_run_reports_what_the_server_did(server: OpenAIServer, endpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    words = options_for(server, "--endpoint", endpoint, "--output", str(output), "--goodput", "ttft:5000", "e2el:9000")
    summary = await bench(parser().parse_args([*words, "--num-gpus", "2"]))
    assert (summary.requests, summary.completed, summary.errors) == (6, 6, {})
    # The server's own pace is a lower bound whatever else the machine does.
    assert summary.ttft.p50 >= 1000 * server.prefill_s
    assert summary.tpot.p50 >= 1000 * server.token_s
    assert summary.e2e.p50 >= 1000 * (server.prefill_s + 4 * server.token_s)
    assert summary.output_throughput == pytest.approx(30 / summary.duration_s)
    assert summary.input_throughput == pytest.approx(240 / summary.duration_s)
    assert summary.per_gpu == pytest.approx(summary.total_throughput / 2)
    assert summary.attainment == 1.0
    report = orjson.loads(output.read_bytes())
    assert report["settings"]["model"] == "numbers"
    assert report["summary"]["completed"] == 6
    assert [record["output_tokens"] for record in report["records"]] == [5] * 6
    assert all(len(record["gaps_s"]) == 4 for record in report["records"])
    assert "tokens/s" in table(summary)


async def test_bodies_say_what_was_asked_for(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    extra = ["--extra-body", '{"temperature": 1}', "--header", "X-Session-ID: 7", "--prefix-len", "10"]
    await bench(parser().parse_args(options_for(server, *extra, "--warmup", "2")))
    assert len(server.bodies) == 8
    body = server.bodies[-1]
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("numbers", 5, 1, True)
    assert body["ignore_eos"] is True
    assert len(body["prompt"]) == 50
    assert all(isinstance(token, int) and 16 <= token < 100_000 for token in body["prompt"])
    counted = [tuple(body["prompt"]) for body in server.bodies[2:]]
    assert len(set(counted)) == 6
    assert len({prompt[:10] for prompt in counted}) == 1
    assert all(tuple(body["prompt"])[:10] != counted[0][:10] for body in server.bodies[:2])
    assert server.headers[-1]["X-Session-ID" if "X-Session-ID" in server.headers[-1] else "x-session-id"] == "7"
    assert {headers.get("Authorization") or headers.get("authorization") for headers in server.headers} == {
        "Bearer secret"
    }


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("refuse", "HTTP 503: queue is full"),
        ("error event", "error event: decode node lost"),
        ("cut", "cut after 2 events"),
        ("not json", "JSONDecodeError"),
    ],
)
async def test_a_request_that_fails_is_counted_by_its_reason(server: OpenAIServer, fault: str, expected: str) -> None:
    server.fault = fault
    summary = await bench(parser().parse_args(options_for(server, "--goodput", "ttft:5000")))
    assert summary.completed == 0
    assert summary.attainment == 0.0
    assert sum(summary.errors.values()) == 6
    assert all(expected in reason for reason in summary.errors)
    assert expected in table(summary)


async def test_a_server_that_stops_talking_ends_the_request(server: OpenAIServer) -> None:
    server.prefill_s = 30.0
    summary = await asyncio.wait_for(bench(parser().parse_args(options_for(server, "--idle-timeout", "0.2"))), 10)
    assert summary.completed == 0
    assert any("imeout" in reason for reason in summary.errors)


async def test_a_server_that_is_not_there_is_an_error_before_the_run() -> None:
    with pytest.raises(ConfigError, match="use --model"):
        await bench(parser().parse_args(["--url", "http://127.0.0.1:1"]))
    summary = await bench(parser().parse_args(["--url", "http://127.0.0.1:1", "--model", "m", "--num-prompts", "2"]))
    assert summary.completed == 0


async def test_without_usage_events_are_counted(server: OpenAIServer) -> None:
    server.fault = "no usage"
    summary = await bench(parser().parse_args(options_for(server)))
    assert summary.completed == 6
    assert summary.output_throughput == pytest.approx(30 / summary.duration_s)


async def test_concurrency_has_a_bound_and_arrivals_have_a_rate(server: OpenAIServer) -> None:
    bounded = await bench(parser().parse_args(options_for(server, "--max-concurrency", "2")))
    assert server.most_open == 2
    assert bounded.max_concurrency == 2
    assert bounded.slip.max == 0
    paced = await bench(parser().parse_args(options_for(server, "--request-rate", "20", "--burstiness", "1000000")))
    assert paced.duration_s >= 5 / 20


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--goodput", "itl:5"], "expected one of ttft, tpot, e2el"),
        (["--goodput", "ttft:fast"], "expected KEY:MILLISECONDS"),
        (["--workload", "trace"], "needs --trace"),
        (["--num-prompts", "0"], "must be positive"),
        (["--request-rate", "-1"], "must be positive"),
        (["--seed", "-1"], "must not be negative"),
    ],
)
async def test_options_that_make_no_sense_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        await bench(parser().parse_args(["--url", "http://127.0.0.1:1", "--model", "m", *words]))


def test_a_seed_decides_the_whole_workload() -> None:
    def run(*words: str) -> list[tuple[float | None, tuple[int, ...], int]]:
        options = parser().parse_args(["--workload", "conversation", "--request-rate", "3", *words])
        return [(job.arrives_s, tuple(job.prompt_ids.tolist()), job.output_len) for job in jobs_of(options, 5, 1)]

    assert run() == run()
    assert run() != run("--input-len", "1000")


def test_arrivals_and_lengths_have_the_means_asked_for() -> None:
    rng = random.Random(0)
    times = arrivals(20_000, 8.0, 1.0, rng)
    assert times[-1] == pytest.approx(20_000 / 8, rel=0.03)
    lengths = lognormal_lengths(200, 8192, rng)
    assert np.mean([next(lengths) for _ in range(20_000)]) == pytest.approx(200, rel=0.05)
    assert arrivals(3, float("inf"), 1.0, rng) == [None] * 3


def test_a_trace_repeats_tokens_where_it_repeats_blocks(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47]},
        {"timestamp": 30482, "input_length": 600, "output_length": 0, "hash_ids": [46, 48]},
    ]
    trace.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    options = parser().parse_args(["--workload", "trace", "--trace", str(trace), "--speed", "2"])
    first, second = jobs_of(options, 10, 0)
    assert (first.arrives_s, second.arrives_s) == (0.0, 1.5)
    assert (len(first.prompt_ids), len(second.prompt_ids)) == (1100, 600)
    assert np.array_equal(first.prompt_ids[:512], second.prompt_ids[:512])
    assert not np.array_equal(first.prompt_ids[512:600], second.prompt_ids[512:600])
    assert (first.output_len, second.output_len) == (52, 1)
    trace.write_bytes(b"{}\n")
    with pytest.raises(ConfigError, match="line 1"):
        jobs_of(options, 10, 0)


def test_the_arithmetic_of_a_summary() -> None:
    def record(sent: float, ttft: float, e2e: float, tokens: int, error: str | None = None) -> Record:
        gaps = [(e2e - ttft) / (tokens - 1)] * (tokens - 1)
        return Record(slip_s=0, prompt_tokens=10, sent_s=sent, ttft_s=ttft, e2e_s=e2e, gaps_s=gaps,
                      output_tokens=tokens, error=error)  # fmt: skip

    records = [record(0, 0.5, 1.5, 11), record(1, 0.1, 4.1, 21), record(2, 0.1, 3.0, 6, "cut")]
    summary = summarise(records, slo=parse_slo(["ttft:500", "tpot:100"]), num_gpus=None)
    assert summary.duration_s == pytest.approx(5.1)
    assert summary.output_throughput == pytest.approx(32 / 5.1)
    assert summary.tpot.max == pytest.approx(200)
    assert summary.user_throughput == pytest.approx((10 + 5) / 2)
    assert summary.max_concurrency == 2
    assert summary.goodput == pytest.approx(1 / 5.1)
    assert summary.attainment == pytest.approx(1 / 3)
    assert summarise([], slo={}, num_gpus=None).completed == 0


def test_percentiles_match_numpy() -> None:
    values = sorted(random.Random(1).random() for _ in range(57))
    for q in (0, 1, 50, 90, 99, 100):
        assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))
