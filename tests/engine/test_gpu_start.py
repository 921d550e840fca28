"""On a real GPU: numbers resolved at start, errors that name the number to change, and traces of steps."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.device import wait_until_quiet
from engine.engine import Engine
from engine.loader import LoadedRank, load_rank
from engine.profiling import StepTracer
from model.config import ModelConfig
from runtime.errors import ConfigError
from runtime.requests import SamplingParams, StepOutput, Submit
from runtime.token_ids import TokenIds

pytestmark = pytest.mark.gpu

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def load(checkpoint: Path, **settings: object) -> LoadedRank:
    config = EngineConfig(
        model=str(checkpoint), device="cuda", **{"max_num_seqs": 4, "max_num_batched_tokens": 512, **settings}
    )
    return load_rank(config, holds_states=False, progress=False)


def used_share() -> float:
    free, total = torch.cuda.mem_get_info()
    return 1.0 - float(free) / float(total)


def test_state_takes_what_the_utilization_leaves_beside_weights_steps_and_a_reserve(tiny_checkpoint: Path) -> None:
    total = torch.cuda.mem_get_info()[1]
    utilization = used_share() + 6 * GIB / total
    loaded = load(
        tiny_checkpoint, gpu_memory_utilization=utilization, max_num_seqs=2048, max_num_batched_tokens=2048
    )  # fmt: skip
    assert loaded.config.num_pages == loaded.memory.pages.shape[0]
    assert utilization - 4 * GIB / total < used_share() <= utilization


def test_the_longest_request_is_the_models_limit_or_what_the_pages_hold(tiny_checkpoint: Path) -> None:
    limit = ModelConfig.load(str(tiny_checkpoint)).max_position_embeddings
    assert load(tiny_checkpoint).config.max_model_len == limit
    few = load(tiny_checkpoint, num_pages=9, max_num_seqs=4, block_size=32)
    assert few.config.max_model_len == 6 * 32
    assert few.shape.max_model_len == 6 * 32


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_pages": 1 << 40}, "engine.num_pages"),
        ({"gpu_memory_utilization": 0.001}, "engine.gpu_memory_utilization"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_number_to_change(
    tiny_checkpoint: Path, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load(tiny_checkpoint, **settings)


@pytest.mark.parametrize(
    ("room", "named"), [(0, "data_parallel_size"), (256 << 20, "engine.max_num_batched_tokens=65536")]
)
def test_weights_and_steps_that_do_not_fit_are_refused_with_a_way_out(
    tiny_checkpoint: Path, room: int, named: str
) -> None:
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room + 1) / total)
    try:
        with pytest.raises(ConfigError, match=named):
            load(tiny_checkpoint, max_num_seqs=65536, max_num_batched_tokens=65536)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("captured", [False, True])
def test_steps_neither_wait_for_the_default_stream_nor_keep_it_waiting(tiny_checkpoint: Path, captured: bool) -> None:
    loaded = load(tiny_checkpoint, num_pages=64, block_size=32, enforce_eager=not captured)
    own = torch.cuda.current_stream()
    assert own != torch.cuda.default_stream()
    assert load(tiny_checkpoint, num_pages=64, block_size=32).device == loaded.device
    assert torch.cuda.current_stream() == own, "one stream, however often a rank is loaded"
    engine = Engine(
        loaded.config, loaded.shape, loaded.features, head=loaded.model.logits, device=loaded.device
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    for attempt in range(4):
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda._sleep(1 << 31)  # cycles: about a second
        engine.submit(Submit(request_id=f"r{attempt}", prompt_ids=TokenIds(range(3, 40)), sampling=sampling))
        while engine.has_work:
            assert all(isinstance(message, StepOutput) for message in engine.step())
        if not torch.cuda.default_stream().query():
            break
        # The first ones compile and load kernels, which waits for the device.
    else:
        pytest.fail("the default stream was always the first to end")
    torch.cuda.synchronize()


def test_a_thread_knows_when_what_it_launched_has_ended() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert wait_until_quiet(device, 10.0)
    torch.cuda._sleep(1 << 30)
    assert not wait_until_quiet(device, 0.01)
    assert wait_until_quiet(device, 10.0)
    assert torch.cuda.current_stream().query()


def test_a_signal_leaves_a_trace_of_the_next_steps_with_their_kernels(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load(tiny_checkpoint, num_pages=64, block_size=32, profiler_ranges=True)
    engine = Engine(
        loaded.config, loaded.shape, loaded.features, head=loaded.model.logits, device=loaded.device
    )  # fmt: skip
    tracer = StepTracer(tmp_path, 3, rank=2)
    before = signal.getsignal(signal.SIGUSR2)
    tracer.listen()
    try:
        sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        engine.submit(Submit(request_id="r", prompt_ids=TokenIds(range(3, 40)), sampling=sampling))
        steps = 0
        while engine.has_work:
            if steps == 4:
                os.kill(os.getpid(), signal.SIGUSR2)
            tracer.before_step()
            assert all(isinstance(message, StepOutput) for message in engine.step())
            tracer.after_step()
            steps += 1
    finally:
        signal.signal(signal.SIGUSR2, before)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("rank2-")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    kernels = [event["name"] for event in events if event.get("cat") == "kernel"]
    phases = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert len(kernels) > 50, "the steps' kernels, also of captured ones"
    assert {"schedule", "launch", "wait", "emit"} <= phases, phases
