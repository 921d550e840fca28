"""Which kernels a step of one GPU rank runs: the dearest ones, and all of them by kind of sublayer, in their order.

A sublayer begins where the hyper-connection writes back what the one before it has computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig

SEAMS = ("_post_kernel", "hyper_project")
"""Kernels that begin a sublayer, by part of their name."""
TOP = 28
"""Kernels listed among the dearest."""
NAME = 100
"""Characters of a kernel's name."""


class Span(NamedTuple):
    """One kernel on the device, microseconds."""

    name: str
    start: float
    us: float


def record(call: Callable[[], object]) -> list[Span]:
    """The kernels that `call` runs, in order of time."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        call()
        torch.cuda.synchronize()
    spans = [
        Span(_short(event.name), event.time_range.start, event.time_range.elapsed_us())
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(spans, key=lambda span: span.start)


def _short(name: str) -> str:
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "at_cuda_detail::"):
        name = name.replace(noise, "")
    return name[:NAME]


def dearest(what: str, spans: Sequence[Span]) -> list[str]:
    """The kernels that take the time, and for how much of it the device ran none."""
    spent: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        spent[span.name].append(span.us)
    total = sum(span.us for span in spans)
    wall = max((span.start + span.us for span in spans), default=0.0) - min((s.start for s in spans), default=0.0)
    lines = [f"{what}: {len(spans)} launches, {total / 1e3:.2f} ms in kernels, {wall / 1e3:.2f} ms from first to last"]
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:TOP]:
        us = sum(times)
        lines.append(f"  {us / 1e3:9.3f} ms {len(times):6d} x {us / len(times):8.1f} us  {name}")
    return lines


def by_sublayer(spans: Sequence[Span], config: ModelConfig) -> list[str]:
    """Of every kind of sublayer: how many there are, mean time from its first kernel to the next sublayer's, launches,
    and its kernels in order with their mean times and the mean time before each in which the device ran none.

    What runs before the second sublayer and after the last is left out."""
    sublayers = list(_sublayers(spans, config))
    kinds: dict[str, list[Sequence[Span]]] = defaultdict(list)
    for kind, kernels in sublayers:
        kinds[kind].append(kernels)
    lines: list[str] = []
    for kind, members in kinds.items():
        length = len(members[-1]) - 1
        alike = [kernels for kernels in members if len(kernels) - 1 == length]
        wall = sum(kernels[-1].start - kernels[0].start for kernels in alike) / len(alike)
        busy = sum(span.us for kernels in alike for span in kernels[:-1]) / len(alike)
        lines.append(f"{kind}: {len(members)} of them, {wall:.1f} us each, {busy:.1f} in {length} kernels")
        for place in range(length):
            column = [kernels[place] for kernels in alike]
            us = sum(span.us for span in column) / len(column)
            gaps = [k[place + 1].start - k[place].start - k[place].us for k in alike]
            lines.append(f"  {us:9.1f} us, then {sum(gaps) / len(gaps):5.1f} idle  {column[0].name}")
    return lines


def _sublayers(spans: Sequence[Span], config: ModelConfig) -> Iterator[tuple[str, Sequence[Span]]]:
    """(kind, its kernels and the first of the next sublayer), from the second sublayer on."""
    begins = [place for place, span in enumerate(spans) if any(seam in span.name for seam in SEAMS)]
    expected = 2 * config.num_hidden_layers
    # The seam behind the last sublayer may be a launch or not.
    for number, (start, stop) in enumerate(pairwise(begins), start=1):
        if number < expected:
            layer = number // 2
            routing = "by token" if config.is_hash_layer(layer) else "by score"
            kind = f"experts {routing}" if number % 2 else f"attention {config.layer_kind(layer)}"
            yield kind, spans[start : stop + 1]
