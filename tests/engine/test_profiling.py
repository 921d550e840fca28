"""Traces of steps: as many as asked for, written where said, and never the end of serving."""

import gzip
import json

import torch

from engine.profiling import StepTracer, spans


def run_steps(tracer, count):
    for _ in range(count):
        tracer.before_step()
        with spans(True, torch.device("cpu"))("launch"):
            torch.ones(3).sum()
        tracer.after_step()


def test_a_request_records_the_next_steps_and_writes_one_trace(tmp_path):
    tracer = StepTracer(tmp_path / "new", 3, rank=5)
    run_steps(tracer, 2)
    assert not (tmp_path / "new").exists(), "nobody asked"
    tracer.request()
    run_steps(tracer, 10)
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("rank5-")
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("launch") == 3


def test_a_trace_that_was_cut_short_is_written_and_one_that_cannot_be_is_logged(tmp_path, caplog):
    tracer = StepTracer(tmp_path, 100, rank=0)
    tracer.request()
    run_steps(tracer, 1)
    tracer.finish()
    tracer.finish()
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("")
    blocked = StepTracer(tmp_path / "file" / "below", 1, rank=0)
    blocked.request()
    run_steps(blocked, 2)
    assert "could not be written" in caplog.text


def test_without_ranges_a_span_is_nothing():
    span = spans(False, torch.device("cpu"))
    assert span("a") is span("b")
