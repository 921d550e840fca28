"""Decode steps and prefill chunks of one rank of DP4+EP4 on one GPU, at Flash's full width.

    python -m benchmarks.gpu_step [--layers 43] [--batches 256,64,512] [--context 8192] [--chunk 16384]
                                  [--profile DIR] [--deadline-s 600]

64 local experts see the traffic of four ranks; communication is left out. Weights are random, states are random bytes
near zero. "step": wall clock per step of the real engine, which schedules one step ahead; "graph" and "head": device
time of the captured step and of what follows it, head and greedy sampling; "idle": what of a step neither explains.
Bound and peers are the issue's, for 43 layers; other layer counts are compared with their share of them.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_profile import by_sublayer, dearest, record
from benchmarks.gpu_rank import PAGE_TOKENS, Rank, build_rank, drop_all, first_layers, seconds, start_decoding
from engine.batch import PaddedShape
from engine.engine import Engine
from engine.memory import PoolSizes
from model.config import ModelConfig
from model.presets import flash
from runtime.requests import RequestFailed, SamplingParams, Submit
from runtime.token_ids import TokenIds

RANKS = 4
LAYERS = 43
DECODE = {64: (11.2, 17.1, 20.0), 256: (14.0, 25.0, 29.0), 512: (19.4, 36.5, 42.0)}
"""Batch -> bound, sum of the best peers' kernels, floor to reach: milliseconds on an H200."""
PREFILL = (415.0, 656.0, 800.0)
STEPS = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--batches", default="256,64,512")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=16384, help="0 = no prefill")
    parser.add_argument("--profile", type=Path, help="directory for kernel tables")
    parser.add_argument("--deadline-s", type=float, default=600.0, help="begin nothing new after this long")
    arguments = parser.parse_args()
    started = time.monotonic()
    batches = [int(part) for part in arguments.batches.split(",") if part]
    rank = _build(arguments.layers, batches, arguments.context, arguments.chunk)
    free, total = torch.cuda.mem_get_info()
    used = (total - free) / 2**30
    print(f"{torch.cuda.get_device_name()}: {arguments.layers} layers built in {time.monotonic() - started:.1f} s, "
          f"{used:.1f} of {total / 2**30:.1f} GiB in use", flush=True)  # fmt: skip
    share = arguments.layers / LAYERS
    print(
        "| what | step ms | graph | head | idle | bound | of bound | peers | reach |\n" + "|---" * 9 + "|", flush=True
    )
    rows = [
        (f"decode {batch}", partial(_decode, rank, batch, arguments.context, share, arguments.profile))
        for batch in batches
    ]
    if arguments.chunk:
        # After the first batch: the most important numbers first.
        prefill = partial(_prefill, rank, arguments.chunk, share, arguments.profile)
        rows.insert(min(1, len(rows)), (f"prefill {arguments.chunk}", prefill))
    failed = 0
    for what, measure in rows:
        if time.monotonic() - started > arguments.deadline_s:
            print(f"| {what} | not begun: past the deadline |", flush=True)
            continue
        try:
            measure()
        except Exception:
            failed += 1
            print(f"| {what} | failed |\n{traceback.format_exc()}", flush=True)
        gc.collect()  # the engine and its captured steps
        torch.cuda.empty_cache()
    print(f"done after {time.monotonic() - started:.1f} s", flush=True)
    return min(1, failed)


def _build(layers: int, batches: list[int], context: int, chunk: int) -> Rank:
    most = max(batches, default=1)
    context = context if batches else 0
    length = max(context + PAGE_TOKENS, chunk + PAGE_TOKENS)
    pages = max(most * (context // PAGE_TOKENS + 2), chunk // PAGE_TOKENS + 2) + 8
    sizes = PoolSizes(num_pages=pages, num_slots=most, max_model_len=length)
    return build_rank(first_layers(flash(), layers), sizes, "cuda:0", ranks=RANKS)


def _line(what: str, ms: float, parts: str, anchors: tuple[float, float, float], share: float) -> None:
    bound, peers, reach = (share * value for value in anchors)
    print(f"| {what} | {ms:.2f} | {parts} | {bound:.1f} | {bound / ms:.0%} | {peers:.1f} | {reach:.1f} |", flush=True)


def _decode(rank: Rank, batch: int, context: int, share: float, directory: Path | None) -> None:
    began = time.monotonic()
    engine = rank.engine(max_num_seqs=batch, async_scheduling="on", cudagraph_capture_sizes=(batch,))
    captured_s = time.monotonic() - began
    start_decoding(engine, batch, context)
    _steps(engine, 4)
    step_ms = 1e3 * seconds(lambda: _steps(engine, STEPS), rank.device) / STEPS
    shape = PaddedShape(batch, -(-(context + PAGE_TOKENS) // PAGE_TOKENS))
    graphs = engine._graphs
    assert graphs is not None
    replayed = graphs.shape_for(*shape)
    assert replayed is not None
    graph_ms = _event_ms(lambda: graphs.replay(replayed))
    features = graphs.replay(replayed)
    head_ms = _event_ms(lambda: rank.model.logits(features).max(-1))
    idle = max(0.0, 1 - (graph_ms + head_ms) / step_ms)
    parts = f"{graph_ms:.2f} | {head_ms:.2f} | {idle:.1%}"
    _line(f"decode {batch}, {context} tokens each", step_ms, parts, DECODE.get(batch, (0.0, 0.0, 0.0)), share)
    print(f"  (captured in {captured_s:.1f} s)", flush=True)
    if directory is not None:
        _profile(lambda: graphs.replay(replayed), rank.config, directory / f"decode-{batch}.txt")
    drop_all(engine, batch)


def _steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        _step(engine)


def _step(engine: Engine) -> None:
    """Raises RuntimeError when a request fails: what is timed then is not what was meant."""
    for message in engine.step():
        if isinstance(message, RequestFailed):
            raise RuntimeError(f"{message.request_id} failed: {message.message}")


def _event_ms(call: object, repeats: int = 8) -> float:
    assert callable(call)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.inference_mode():
        call()
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / repeats


def _prefill(rank: Rank, chunk: int, share: float, directory: Path | None) -> None:
    engine = rank.engine(max_num_seqs=1, max_num_batched_tokens=chunk, async_scheduling="on")

    def run() -> None:
        engine.submit(
            Submit(
                request_id="p", prompt_ids=TokenIds(10 + token % 100_000 for token in range(chunk)),
                sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
            )
        )  # fmt: skip
        while engine.has_work:
            _step(engine)

    warm_ms = 1e3 * seconds(run, rank.device)
    ms = min(1e3 * seconds(run, rank.device) for _ in range(2))
    _line(f"prefill {chunk} ({chunk / ms:.1f}k tok/s; first {warm_ms:.0f} ms)", ms, " | | ", PREFILL, share)
    if directory is not None:
        _profile(run, rank.config, directory / f"prefill-{chunk}.txt")


def _profile(call: Callable[[], object], config: ModelConfig, path: Path) -> None:
    """Prints the dearest kernels; the file also gets those of every kind of sublayer."""
    spans = record(call)
    lines = dearest(path.stem, spans)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join((*lines, *by_sublayer(spans, config))) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
