"""Everything worth knowing about a GPU in one short lease: is it right, then how fast is it.

    python -m benchmarks.gpu_bringup --out DIR [--deadline-s 150] [--stages a,b,...]

Stages are processes of their own, so a failure or a crash ends one and no other. Those that mostly compile run side by
side first, and fill the caches of nvcc and Triton; those that are timed run alone after them, as long as the deadline
allows. What each says is printed when it ends and kept in DIR/STAGE.txt; DIR/summary.json has exit codes and seconds.

    compile     CUDA C++ kernels
    kernels     state and sampling kernels against their twins at Flash's size (pytest)
    sublayers   every sublayer of the tiny model and of a Flash-wide slice against the CPU in float32, same inputs
    engine      captured against eager, ahead against in turn, alone against in company, tiny model
    exchange    tokens to their experts and back through NCCL, eager and captured, one rank for each GPU
    warm-64, warm-256, warm-512, warm-prefill
                decode steps and a prompt chunk of a Flash-wide slice: their kernels are compiled before they are timed
    full        decode steps and a prompt chunk at 43 layers
    mixed       64 requests of 1K to 128K tokens through a Flash-wide slice, pages audited; replay and company there too
    memory      what the largest steps need
    handoff     states from one process to another through device memory, where Mooncake's CUDA wheel is installed
    engines     what prefill and decode say in two processes, and ranks that share experts, against one process (pytest)
    load        weights from disk to the device, against the disk
    state       each of the state kernels timed alone
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec
import torch

from benchmarks.gpu_rank import PAGE_TOKENS, Rank, build_rank, first_layers, generate, on_cpu
from engine.activations import activation_bytes, probe_batch
from engine.memory import PoolSizes
from kernels import cuda_build
from kernels.activations import Activations
from kernels.moe import ExpertWeights
from kernels.packed_experts import PackedBank, PackedExperts, gate_up_order, unpack_values
from kernels.quantize import dequantize_fp4, dequantize_fp8_tiles
from model.batch import ForwardBatch
from model.config import EXPERT_GROUP, QUANT_TILE, ModelConfig
from model.context import ForwardContext
from model.linear import Linear, StackedWeight, Weight
from model.presets import flash, tiny
from model.state import StateViews
from model.transformer import Transformer

WARM = {"warm-64": ("64", 0), "warm-256": ("256", 0), "warm-512": ("512", 0), "warm-prefill": ("", 16384)}
"""Stage -> decode batch, tokens of the prompt chunk."""
KERNEL_TESTS = (
    "attention_inputs",
    "compressor_kernels",
    "index_hopper",
    "index_kernels",
    "sampling",
    "sparse_attention",
)
TOGETHER = ("compile", "kernels", "sublayers", "engine", "exchange", *WARM)
ALONE = ("full", "mixed", "memory", "handoff", "engines", "load", "state")
SLACK = 0.02
"""Relative error (Frobenius) granted beyond one and a half times that of the same sublayer in bfloat16 on the CPU:
quantised values and index choices that are near a boundary fall to either side."""
BATCH_TOLERANCE = 0.05
"""Largest relative difference of a request's logits alone and in company."""
SLICE_LAYERS = 4
GRACE_S = 3.0


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.float().cpu()
    return float((got.float().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-20))


def check(what: str, holds: bool, detail: str) -> None:
    print(f"{'ok  ' if holds else 'FAIL'} {what}: {detail}", flush=True)


def attempt(what: str, call: Callable[[], None]) -> None:
    """One part of a stage; the next ones run whatever it does."""
    started = time.monotonic()
    try:
        call()
    except Exception:
        print(f"FAIL {what} after {time.monotonic() - started:.1f} s\n{traceback.format_exc()}", flush=True)
    else:
        print(f"     {what}: {time.monotonic() - started:.1f} s", flush=True)


# Stages


def stage_compile() -> None:
    with ThreadPoolExecutor() as pool:
        for name, built in [
            (path.stem, pool.submit(cuda_build.build, path.stem)) for path in cuda_build.SOURCE_DIR.glob("*.cu")
        ]:
            attempt(name, lambda built=built: print(built.result()))  # type: ignore[misc]


def stage_kernels() -> None:
    files = [f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS]
    run_module("pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", *files)


def stage_sublayers(device: str = "cuda:0") -> None:
    attempt("tiny model", lambda: compare_sublayers(tiny(), device, (70, 1, 1, 19)))
    wide = replace_experts(first_layers(flash(), SLICE_LAYERS), 8)
    attempt("Flash-wide slice", lambda: compare_sublayers(wide, device, (150, 1, 5)))


def replace_experts(config: ModelConfig, count: int) -> ModelConfig:
    """Fewer experts of the same size, so that a CPU can hold them."""
    return msgspec.structs.replace(config, n_routed_experts=count, vocab_size=2048)


def compare_sublayers(config: ModelConfig, device: str, chunks: tuple[int, ...]) -> None:
    """One request's chunks through every sublayer, each with the same input everywhere: on the device, on the CPU in
    float32, and on the CPU in bfloat16, whose distance from float32 says what rounding alone may cost."""
    there = build_rank(config, PoolSizes(num_pages=4, num_slots=2, max_model_len=1024), device)
    exact, rounded = mirror(there, torch.float32), mirror(there, torch.bfloat16)
    ranks = (exact, rounded, there)
    start = 0
    worst: dict[str, list[float]] = {}
    for size in chunks:
        batch = chunk_batch(start, size, config.vocab_size)
        start += size
        contexts = [context_of(rank, batch) for rank in ranks]
        generator = torch.Generator().manual_seed(start)
        for number in range(config.num_hidden_layers):
            x = torch.randn(size, config.hidden_size, generator=generator).bfloat16()
            for place, name in enumerate(("attn", "ffn")):
                outputs = []
                for rank, context in zip(ranks, contexts, strict=True):
                    sublayer = list(rank.model.layers[number].sublayers())[place][2]
                    with torch.inference_mode():
                        moved = Activations(x.to(rank.device, rank.model.dtype))
                        outputs.append(sublayer(moved, rank.state.layers[number], context))
                errors = [relative(output, outputs[0]) for output in outputs[1:]]
                key = f"layer {number} {config.layer_kind(number)} {name}"
                worst[key] = [max(pair) for pair in zip(worst.get(key, [0.0, 0.0]), errors, strict=True)]
    for key, (by_rounding, error) in worst.items():
        detail = f"{error:.4f} from float32, bfloat16 on the CPU {by_rounding:.4f}"
        check(key, error < 1.5 * by_rounding + SLACK, detail)
    for rank in ranks:
        rank.memory.slots.fill_(0xFF)
        rank.memory.pages.fill_(0xFF)
    logits = [
        rank.model.forward(move(chunk_batch(0, 40, config.vocab_size), rank.device), rank.state) for rank in ranks
    ]
    by_rounding, error = (relative(other, logits[0]) for other in logits[1:])
    detail = f"{error:.4f} from float32, bfloat16 on the CPU {by_rounding:.4f}"
    check("whole model, logits after 40 tokens over poisoned memory", error < 1.5 * by_rounding + SLACK, detail)


def context_of(rank: Rank, batch: ForwardBatch) -> ForwardContext:
    moved = move(batch, rank.device)
    index = moved.index(rank.layout.page_tokens)
    return ForwardContext(token_ids=moved.token_ids, index=index, dtype=rank.model.dtype, simulate=True)


def mirror(rank: Rank, dtype: torch.dtype) -> Rank:
    """The same weights dequantised on the CPU, with zeroed pools on both sides."""
    model = Transformer(rank.config, dtype=dtype, numerics="released", fp8_output=rank.model.fp8_output)
    for name in ("embed", "norm", "hc_head"):
        copy_weights(getattr(model, name), getattr(rank.model, name))
    model.head.value = rank.model.head.value.cpu().float()
    for ours, theirs in zip(model.layers, rank.model.layers, strict=True):
        copy_weights(ours, theirs)
        copy_experts(ours.ffn.bank.weights, theirs.ffn.bank.weights, rank.config)
    pages, slots = (torch.zeros(pool.shape, dtype=torch.uint8) for pool in (rank.memory.pages, rank.memory.slots))
    rank.memory.pages.zero_()
    rank.memory.slots.zero_()
    memory = replace(rank.memory, pages=pages, slots=slots)
    return replace(rank, model=model, memory=memory, state=StateViews(rank.layout, pages, slots))


def copy_weights(ours: object, theirs: object) -> None:
    """Every weight below two equal trees of the model's objects."""
    if isinstance(ours, Linear) and isinstance(theirs, Linear):
        assert ours.weight is not None
        if theirs.codes is not None and theirs.scales is not None:
            ours.weight.copy_(dequantize_fp8_tiles(theirs.codes, theirs.scales, QUANT_TILE))
        elif theirs.weight is not None:
            ours.weight.copy_(theirs.weight.cpu())
    elif isinstance(ours, StackedWeight) and isinstance(theirs, StackedWeight):
        ours.value.copy_(theirs.value.cpu())
    elif isinstance(ours, Weight) and isinstance(theirs, Weight):
        ours.value = theirs.value.cpu().to(ours.dtype)
    else:
        for name, value in vars(ours).items():
            if type(value).__module__.startswith("model.") and hasattr(value, "__dict__"):
                copy_weights(value, getattr(theirs, name))


def copy_experts(ours: object, theirs: object, config: ModelConfig) -> None:
    """Dequantised where they are: on a CPU that takes seconds for each expert of Flash."""
    assert isinstance(ours, ExpertWeights)
    if isinstance(theirs, PackedBank):
        order = gate_up_order(config.moe_intermediate_size, theirs.up.data.device)
        for expert in range(ours.w13.shape[0]):
            up, down = (
                unpack_values(PackedExperts(part.data[expert : expert + 1], part.row_scale[expert : expert + 1]))[0]
                for part in (theirs.up, theirs.down)
            )
            ours.w13[expert].copy_(torch.empty_like(up).index_copy_(0, order, up))
            ours.w2[expert].copy_(down)
        return
    assert isinstance(theirs, ExpertWeights)
    for mine, packed, scale in ((ours.w13, theirs.w13, theirs.w13_scale), (ours.w2, theirs.w2, theirs.w2_scale)):
        for expert in range(mine.shape[0]):
            values = packed[expert] if scale is None else dequantize_fp4(packed[expert], scale[expert], EXPERT_GROUP)
            mine[expert].copy_(values)


def chunk_batch(start: int, size: int, vocab: int) -> ForwardBatch:
    """The next `size` tokens of one request in pages 0.. and slot 0."""
    ids = (torch.arange(start, start + size) * 7919 + 13) % vocab
    return ForwardBatch(
        token_ids=ids, positions=torch.arange(start, start + size),
        query_start=torch.tensor([0, size], dtype=torch.int32), context_len=torch.tensor([start], dtype=torch.int32),
        slot_ids=torch.zeros(1, dtype=torch.int32), page_table=torch.arange(4, dtype=torch.int32)[None],
        logits_rows=torch.tensor([size - 1]), token_request=torch.zeros(size, dtype=torch.int32),
        one_token_each=size == 1,
    )  # fmt: skip


def move(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    values = vars(on_cpu(batch))
    return ForwardBatch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def stage_engine(device: str = "cuda:0") -> None:
    sizes = PoolSizes(num_pages=64, num_slots=16, max_model_len=2048)
    rank = build_rank(tiny(), sizes, device)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in (5, 33, 64, 90, 300, 17, 1, 500)]
    settings: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 512}
    kinds: dict[str, dict[str, Any]] = {
        "eager, in turn": {"async_scheduling": "off"},
        "eager, ahead": {"async_scheduling": "on"},
        "captured, ahead": {"async_scheduling": "on", "cudagraph_capture_sizes": (8, 16)},
        "captured, in turn": {"async_scheduling": "off", "cudagraph_capture_sizes": (8, 16)},
    }
    tokens: dict[str, list[list[int]]] = {}

    def run(kind: str) -> None:
        tokens[kind] = generate(rank.engine(**settings, **kinds[kind]), prompts, 24)

    attempt("replay = eager on the same inputs", lambda: compare_replay(rank))
    for kind in kinds:
        attempt(f"generate, {kind}", lambda kind=kind: run(kind))  # type: ignore[misc]
    for one, other in (("eager, in turn", "eager, ahead"), ("captured, ahead", "captured, in turn")):
        if one in tokens and other in tokens:
            check(f"{one} = {other}", tokens[one] == tokens[other], "greedy tokens")
    attempt("alone = in company", lambda: compare_company(rank))
    attempt("every sampling feature", lambda: sample_everything(rank, prompts, settings))


def compare_replay(rank: Rank) -> None:
    """A captured step and the same step launched eagerly, from the same state: bit for bit."""
    engine = rank.engine(max_num_seqs=16, async_scheduling="off", cudagraph_capture_sizes=(8,))
    builder, graphs = engine._builder, engine._graphs
    assert graphs is not None
    shape = graphs.shape_for(8, 1)
    assert shape is not None
    step = builder.padding(shape)
    rows = torch.arange(8, device=rank.device)
    step.batch.slot_ids.copy_(rows.int())
    step.batch.token_ids.copy_(100 + rows)
    step.batch.positions.copy_(20 + 9 * rows)
    step.batch.context_len.copy_((20 + 9 * rows).int())
    step.batch.page_table[:, 0] = rows.int()
    kept = rank.memory.pages.clone(), rank.memory.slots.clone()
    outputs = []
    for captured in (True, False):
        rank.memory.pages.copy_(kept[0])
        rank.memory.slots.copy_(kept[1])
        with torch.inference_mode():
            features = graphs.replay(shape) if captured else rank.features(step.batch)
            outputs.append((features.clone(), rank.memory.pages.clone(), rank.memory.slots[:-1].clone()))
    for name, one, other in zip(("features", "pages", "slots"), *outputs, strict=True):
        check(f"replay, {name}", torch.equal(one, other), "bit for bit")


def compare_company(rank: Rank) -> None:
    """Logits of a decode token alone and beside 15 others."""
    for pool in (rank.memory.pages, rank.memory.slots):
        pool.random_(0x20, 0x40)
    kept = rank.memory.pages.clone(), rank.memory.slots.clone()
    many = probe_batch(rank.layout, 16, 16, 700, rank.device)
    rows = torch.arange(16, device=rank.device)
    many = replace(
        many, slot_ids=rows.int(), token_ids=rows + 50,
        page_table=(3 * rows[:, None] + torch.arange(3, device=rank.device)).int(),
    )  # fmt: skip
    together = rank.model.forward(many, rank.state)
    worst, same = 0.0, 0
    for row in range(16):
        rank.memory.pages.copy_(kept[0])
        rank.memory.slots.copy_(kept[1])
        one = probe_batch(rank.layout, 1, 1, 700, rank.device)
        one = replace(
            one, slot_ids=many.slot_ids[row : row + 1], token_ids=many.token_ids[row : row + 1],
            page_table=many.page_table[row : row + 1],
        )  # fmt: skip
        alone = rank.model.forward(one, rank.state)
        worst = max(worst, relative(together[row : row + 1], alone))
        same += int(together[row].argmax() == alone[0].argmax())
    check("logits alone and beside 15", worst < BATCH_TOLERANCE, f"relative {worst:.5f}, {same} of 16 choose alike")


def sample_everything(rank: Rank, prompts: list[list[int]], settings: dict[str, Any]) -> None:
    features: dict[str, Any] = {
        "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7, "presence_penalty": 0.5,
        "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logprobs": 3, "logit_bias": ((9, 2.0),),
    }  # fmt: skip
    results = [
        generate(rank.engine(**settings, async_scheduling=how), prompts[:4], 12, **features) for how in ("off", "on")
    ]
    check("seeded sampling, ahead = in turn", results[0] == results[1], "all features")


def stage_warm(batches: str, chunk: int) -> None:
    run_module("benchmarks.gpu_step", "--layers", str(SLICE_LAYERS), "--batches", batches, "--chunk", str(chunk))


def stage_full(out: Path, left_s: float) -> None:
    run_module(
        "benchmarks.gpu_step", "--batches", "256,64,512", "--chunk", "16384", "--profile", str(out / "profiles"),
        "--deadline-s", str(max(5.0, left_s - 25)),
    )  # fmt: skip


def stage_mixed() -> None:
    lengths = [131_072 - 64, *[32_768] * 3, *[8192] * 12, *[1000] * 48]
    pages = sum(-(-(length + 32) // PAGE_TOKENS) for length in lengths) + 80
    sizes = PoolSizes(num_pages=pages, num_slots=64, max_model_len=131_072)
    rank = build_rank(first_layers(flash(), SLICE_LAYERS), sizes, "cuda:0", ranks=4)
    attempt("replay = eager on the same inputs", lambda: compare_replay(rank))
    attempt("alone = in company", lambda: compare_company(rank))
    prompts = [
        [10 + (7 * place + number) % 100_000 for place in range(length)] for number, length in enumerate(lengths)
    ]

    def run() -> None:
        engine = rank.engine(async_scheduling="on", cudagraph_capture_sizes=(64,))
        started = time.monotonic()
        tokens = generate(engine, prompts, 16)
        stats = engine.stats()
        whole = all(len(answer) == 16 for answer in tokens)
        returned = (stats.pages_free, stats.slots_free) == (stats.pages_total, stats.slots_total)
        took_s = time.monotonic() - started
        check("every request answered", whole, f"{sum(lengths)} prompt tokens in {took_s:.1f} s, {stats.steps} steps")
        check("every page and slot came back", returned, f"{stats.pages_free} of {stats.pages_total} pages")

    attempt("64 requests of mixed lengths", run)


def stage_memory() -> None:
    rank = build_rank(
        first_layers(flash(), 3), PoolSizes(num_pages=8, num_slots=4, max_model_len=2048), "cuda:0", ranks=4
    )
    config = rank.engine(max_num_seqs=4).config
    for tokens, requests, length in ((2048, 256, 131072), (16384, 64, 131072)):
        sized = msgspec.structs.replace(config, max_num_batched_tokens=tokens, max_num_seqs=requests)
        started = time.monotonic()
        needed = activation_bytes(rank.model, rank.layout, sized, length)
        print(f"steps of {tokens} tokens, {requests} requests, {length} long: {needed / 2**30:.2f} GiB, "
              f"{time.monotonic() - started:.1f} s", flush=True)  # fmt: skip


def stage_handoff() -> None:
    if importlib.util.find_spec("mooncake") is None:
        print("not run: Mooncake is not installed here", flush=True)
        return
    for transport in ("intra_node", "tcp"):
        attempt(
            f"hand-off over {transport}",
            partial(
                run_module, "benchmarks.handoff", "--device", "cuda", "--tokens", "8192", "--rounds", "8",
                "--set", f"transport={transport}",
            ),
        )  # fmt: skip


def stage_engines() -> None:
    if importlib.util.find_spec("mooncake") is None:
        print("not run: Mooncake is not installed here", flush=True)
        return
    run_module("pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", "tests/handoff")


def stage_load() -> None:
    with tempfile.TemporaryDirectory() as directory:
        run_module("benchmarks.load_checkpoint", "--dir", directory)


def run_module(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


# All of them


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline-s", type=float, default=150.0)
    parser.add_argument("--stages", default=",".join((*TOGETHER, *ALONE)))
    parser.add_argument("--only", help="run this stage in this process")
    arguments = parser.parse_args()
    if arguments.only:
        stages: dict[str, Callable[[], None]] = {
            "compile": stage_compile,
            "kernels": stage_kernels,
            "sublayers": stage_sublayers,
            "engine": stage_engine,
            "exchange": partial(run_module, "benchmarks.expert_exchange", "--tokens", "64,512"),
            **{name: partial(stage_warm, *what) for name, what in WARM.items()},
            "full": lambda: stage_full(arguments.out, arguments.deadline_s),
            "mixed": stage_mixed,
            "memory": stage_memory,
            "handoff": stage_handoff,
            "engines": stage_engines,
            "load": stage_load,
            "state": partial(run_module, "benchmarks.kernels", "--only", "state", "--quick"),
        }
        stages[arguments.only]()
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = arguments.stages.split(",")
    deadline = time.monotonic() + arguments.deadline_s
    summary: dict[str, tuple[int | str, float]] = {}
    first = [name for name in TOGETHER if name in wanted]
    # What is timed needs about half of the time.
    share = deadline - 0.5 * arguments.deadline_s if any(name in wanted for name in ALONE) else deadline
    running = [(name, *start(name, arguments.out, share), time.monotonic()) for name in first]
    for name, process, log, began in running:
        summary[name] = (finish(process, log, share), time.monotonic() - began)
        report(name, arguments.out, summary)
    for name in ALONE:
        if name in wanted:
            process, log = start(name, arguments.out, deadline)
            began = time.monotonic()
            summary[name] = (finish(process, log, deadline), time.monotonic() - began)
            report(name, arguments.out, summary)
    print(digest(arguments.out, summary), flush=True)
    return 0


def digest(out: Path, summary: dict[str, tuple[int | str, float]]) -> str:
    """What failed, what was timed, and how many comparisons held: the end of the output is what is always seen."""
    lines = ["=== digest"]
    for name, (code, took_s) in summary.items():
        text = (out / f"{name}.txt").read_text(errors="replace").splitlines()
        held = sum(line.startswith("ok ") for line in text)
        lines.append(f"{name}: exit {code}, {took_s:.1f} s, {held} comparisons held")
        lines += [
            f"  {line[:200]}" for line in text if line.startswith("FAIL") or (line.startswith("| ") and name in ALONE)
        ]
        errors = [line for line in text if "Error" in line and not line.startswith(("FAIL", " "))]
        lines += [f"  {line[:200]}" for line in dict.fromkeys(errors[-3:])]
    return "\n".join(lines)


def start(name: str, out: Path, deadline: float) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    log = (out / f"{name}.txt").open("wb")
    left = max(1.0, deadline - time.monotonic())
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_bringup",
        "--out",
        str(out),
        "--only",
        name,
        "--deadline-s",
        f"{left}",
    ]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True), log


def finish(process: subprocess.Popen[bytes], log: IO[bytes], deadline: float) -> int | str:
    """Exit code, or "killed" when it ran past the deadline."""
    try:
        return process.wait(max(GRACE_S, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "killed"
    finally:
        log.close()


def report(name: str, out: Path, summary: dict[str, tuple[int | str, float]]) -> None:
    code, took_s = summary[name]
    text = (out / f"{name}.txt").read_text(errors="replace")
    shown = text if len(text) < 6000 else f"...\n{text[-6000:]}"
    print(f"=== {name}: exit {code}, {took_s:.1f} s\n{shown}", flush=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
