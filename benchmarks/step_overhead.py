"""What a decode step costs on the host beside the model: scheduling, batch, sampling parameters, bookkeeping, messages.

    python -m benchmarks.step_overhead [--requests 512] [--context 8192] [--steps 400]

The engine is the real one; what runs on the device, the model and the sampler's tensor arithmetic, is replaced by ready
results, and the little that is left of it is timed apart. Rows: all requests greedy; a mix of every sampling feature;
both again while one request in 256 ends in each step and another takes its place. Columns are medians in microseconds
of the step thread's CPU time: on an idle machine the time that passes, on a busy one without most of what the others
take. "host" is the whole step without the device's share, with its 10th and 99th percentiles. Limit: 2 ms.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch

import engine.engine as step_loop
import engine.runner as device_step
from engine.config import EngineConfig
from engine.intake import EngineShape
from engine.sampler import Logprobs, Sampled, SamplingInputs, logprobs_of
from model.batch import ForwardBatch
from runtime.process import calm_garbage_collector
from runtime.requests import SamplingParams, StepOutput, Submit
from runtime.token_ids import TokenIds

LIMIT_MS = 2.0
VOCAB = 1024
PAGE_TOKENS = 256
FIRST_ORDINARY = 20
OUTPUT_TOKENS = 100_000
"""Of a request that is not meant to end."""
TURNOVER = 256
"""With turnover, a request generates this many tokens on average."""

GREEDY: list[dict[str, Any]] = [{"temperature": 0.0}]
MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 50, "min_p": 0.05},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1},
    {"temperature": 0.6, "logprobs": 5},
    {"temperature": 1.0, "stop_token_ids": (5, 6, 7), "min_tokens": 50},
    {"temperature": 0.8, "logit_bias": ((9, -5.0), (10, 2.0)), "bad_words": ((31, 32), (33,))},
    {"temperature": 0.0, "allowed_token_ids": tuple(range(100, 200))},
]
REPLACED = ((step_loop, "plan_step"), (device_step, "sample"))
"""Functions of modules that a measurement wraps, and puts back."""


class Stopwatch:
    """Seconds spent inside wrapped functions, since the last `lap`."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, attribute: str, name: str, instead: Callable[..., Any] | None = None) -> None:
        inner: Callable[..., Any] = instead or getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self._spent[name] += time.thread_time() - started

        setattr(owner, attribute, timed)

    def lap(self) -> dict[str, float]:
        spent, self._spent = self._spent, defaultdict(float)
        return spent


class ReadyDevice:
    """A model and a sampler whose results are there at once, as a GPU's would be when the host asks for them."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.zeros(rows, VOCAB)
        # Stop ids are looked for and never found: requests end when the load wants them to.
        self._token_ids = torch.randint(FIRST_ORDINARY, VOCAB, (rows,), generator=generator)
        self._logprobs = logprobs_of(torch.randn(rows, VOCAB, generator=generator), self._token_ids, 20)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self._logits[: batch.logits_rows.shape[0]]

    def sample(self, logits: torch.Tensor, inputs: SamplingInputs) -> Sampled:
        logprobs = None
        if inputs.logprobs is not None:
            rows, count = inputs.logprobs
            ready = self._logprobs
            logprobs = Logprobs(
                ready.logprob[rows], ready.rank[rows], ready.top_ids[rows, :count], ready.top_logprobs[rows, :count]
            )
        return Sampled(self._token_ids[: logits.shape[0]].clone(), self._logits[: logits.shape[0], 0], logprobs)


class Load:
    """Keeps `count` requests running."""

    def __init__(self, engine: step_loop.Engine, samplings: list[dict[str, Any]], context: int, turnover: bool) -> None:
        self._engine = engine
        self._samplings = samplings
        self._context = context
        self._turnover = turnover
        self._submitted = 0
        self._random = np.random.default_rng(0)

    def submit(self, prompt_tokens: int) -> None:
        number = self._submitted
        self._submitted += 1
        tokens = int(self._random.integers(1, 2 * TURNOVER)) if self._turnover else OUTPUT_TOKENS
        sampling = {**self._samplings[number % len(self._samplings)], "max_tokens": tokens, "ignore_eos": True}
        sampling["min_tokens"] = min(sampling.get("min_tokens", 0), tokens)
        prompt = tuple(self._random.integers(FIRST_ORDINARY, VOCAB, prompt_tokens).tolist())
        params = SamplingParams(seed=number, **sampling)
        self._engine.submit(Submit(request_id=f"chatcmpl-{number:032x}", prompt_ids=TokenIds(prompt), sampling=params))

    def fill(self, count: int) -> None:
        for _ in range(count):
            self.submit(self._context)
        while self._engine.stats().waiting:
            self._engine.step()
        self._engine.step()

    def replace(self, messages: list[Any]) -> None:
        for message in messages:
            for output in getattr(message, "outputs", ()):
                if output.finish_reason is not None:
                    self.submit(PAGE_TOKENS)


def measure(samplings: list[dict[str, Any]], turnover: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """Median microseconds of each part, and "p10" and "p99" of the host's share."""
    count, context = arguments.requests, arguments.context
    max_len = context + arguments.steps + 16 * PAGE_TOKENS
    num_pages = count * (-(-max_len // PAGE_TOKENS)) + count
    config = EngineConfig(
        model="", block_size=PAGE_TOKENS, max_num_seqs=count, max_num_batched_tokens=max(count, 1 << 16),
        max_queued_requests=2 * count, max_held_requests=0,
    )  # fmt: skip
    shape = EngineShape(
        vocab_size=VOCAB, eos_ids=(1,), max_model_len=max_len, page_tokens=PAGE_TOKENS, num_pages=num_pages,
        num_slots=count,
    )  # fmt: skip
    device = ReadyDevice(count)
    engine = step_loop.Engine(config, shape, device.forward)
    watch = Stopwatch()
    live = engine._live
    unwrapped = [(module, name, getattr(module, name)) for module, name in REPLACED]
    watch.wrap(live, "snapshot", "schedule")
    watch.wrap(engine._builder, "build", "batch")
    watch.wrap(live.sampling, "inputs", "sampling")
    watch.wrap(live.sampling, "record", "device")
    watch.wrap(engine._runner, "_forward", "device")
    watch.wrap(step_loop, "plan_step", "schedule")
    watch.wrap(device_step, "sample", "device", instead=device.sample)
    watch.wrap(engine._emitter, "emit", "tokens")
    encode = msgspec.msgpack.Encoder().encode
    laps: list[dict[str, float]] = []
    load = Load(engine, samplings, context, turnover)
    try:
        load.fill(count)
        watch.lap()
        for _ in range(arguments.steps):
            started = time.thread_time()
            messages = engine.step()
            step_s = time.thread_time() - started
            lap = dict(watch.lap())
            started = time.thread_time()
            for message in messages:
                assert isinstance(message, StepOutput)
                encode(message)
            lap["encode"] = time.thread_time() - started
            lap["host"] = step_s - lap["device"]
            laps.append(lap)
            if turnover:
                load.replace(messages)
            # Else the next step would be charged for freeing them.
            del messages, message
    finally:
        for module, name, function in unwrapped:
            setattr(module, name, function)
    engine.check_integrity()
    names = ("schedule", "batch", "sampling", "tokens", "host", "encode", "device")
    result = {name: 1e6 * float(np.median([lap.get(name, 0.0) for lap in laps])) for name in names}
    result["p10"], result["p99"] = (1e6 * float(np.quantile([lap["host"] for lap in laps], q)) for q in (0.1, 0.99))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--context", type=int, default=8192, help="tokens every request has in its state")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calm_garbage_collector()
    print(f"{arguments.requests} running requests of {arguments.context} tokens; microseconds of CPU per decode step\n")
    columns = ("schedule", "batch", "sampling", "tokens", "other", "host", "p10", "p99", "encode", "device")
    print(f"{'':24s}" + "".join(f"{name:>10s}" for name in columns))
    slowest = 0.0
    for name, samplings, turnover in (
        ("greedy", GREEDY, False),
        ("mixed sampling", MIXED, False),
        ("greedy, turnover", GREEDY, True),
        ("mixed, turnover", MIXED, True),
    ):
        row = measure(samplings, turnover, arguments)
        row["other"] = row["host"] - sum(row[part] for part in ("schedule", "batch", "sampling", "tokens"))
        print(f"{name:24s}" + "".join(f"{row[column]:10.0f}" for column in columns), flush=True)
        slowest = max(slowest, row["host"])
    verdict = "within" if slowest <= 1e3 * LIMIT_MS else "OVER"
    print(f"\nslowest median {slowest / 1e3:.2f} ms: {verdict} the limit of {LIMIT_MS:g} ms")
    return int(slowest > 1e3 * LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
