"""The compressors' kernels against the twins, over histories that cut blocks in every way."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import interpreter

from kernels.compressor import EntryTarget, compress_overlapping_ref, compress_pending_ref
from kernels.triton_compressor import compress_overlapping_triton, compress_pending_triton, fits_gpu
from tests.kernels.state_batches import PAGE_TOKENS, assert_rows_agree, batch, moved, pool, pool_copy

# Chunk sizes of three requests, step by step: blocks begin, continue and close in every way; some have no tokens.
STEPS = [(1, 5, 0), (2, 3, 1), (9, 8, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (5, 1, 4), (1, 16, 14)]
SHORT = STEPS[1:7]
SHARE = {"kv_fp8": 0.97, "key_mxfp4": 0.93, "key_fp8": 0.95, "bf16": 0.97, "f32": 0.0}


class _Both:
    """The same history through kernel and twin."""

    def __init__(self, device, form, rope, width, ratio, dtype, simulate, channels_at=24):
        self.device, self.dtype, self.ratio, self.width = device, dtype, ratio, width
        self.channels_at = channels_at
        self.generator = torch.Generator().manual_seed(width + ratio)
        norm, frequencies = self.randn(width).abs() + 0.5, 10000.0 ** -(torch.arange(32) / 32)
        self.expected = pool(10, PAGE_TOKENS // ratio, width, form, rope)
        self.got = pool_copy(self.expected, device)
        self.target = EntryTarget(norm, frequencies, self.expected, 1e-6, simulate)
        self.moved_target = EntryTarget(norm.to(device), frequencies.to(device), self.got, 1e-6, simulate)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def projected(self, tokens, columns):
        """Two neighbouring parts of a wider projection."""
        both = 2 * self.randn(tokens, 2 * columns + self.channels_at)
        return both[:, self.channels_at :].split(columns, -1)

    def check_entries(self):
        form = self.got.format
        step = 0.02 if self.dtype == torch.bfloat16 and form in ("bf16", "f32") else None
        assert_rows_agree(self.got, self.expected, share=SHARE[form], step=step if not self.target.simulate else 0.4)


def _states(count, *shape, device):
    """Poisoned state, each slot inside a larger record."""
    size = int(torch.tensor(shape).prod())
    expected = torch.full((count, size + 32), torch.nan)[:, 16 : 16 + size].unflatten(1, shape)
    return expected, torch.full((count, size + 32), torch.nan, device=device)[:, 16 : 16 + size].unflatten(1, shape)


def _overlapping(device, steps, *, form, rope, dtype, simulate, width=128):
    both = _Both(device, form, rope, width, 4, dtype, simulate)
    ape = both.randn(4, 2 * width)
    partial, got_partial = _states(4, 4, 2, 2 * width, device=device)
    overlap, got_overlap = _states(4, 4, 2, width, device=device)
    context = [0] * len(steps[0])
    for sizes in steps:
        index = batch(list(zip(context, sizes, strict=True)))
        index.page_table.copy_(torch.arange(9).view(3, 3)[:, : index.page_table.shape[1]])
        index.slot_ids_B.copy_(torch.tensor([3, 0, 2])[: len(sizes)])
        value, score = both.projected(index.num_tokens, 2 * width)
        there = [tensor.to(device) for tensor in (value, score, ape)]
        compress_overlapping_triton(*there, got_partial, got_overlap, moved(index, device), both.moved_target, dtype)
        compress_overlapping_ref(value, score, ape, partial, overlap, index, both.target, dtype)
        torch.testing.assert_close(got_partial.cpu(), partial, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(got_overlap.cpu(), overlap, rtol=0, atol=0, equal_nan=True)
        context = [c + n for c, n in zip(context, sizes, strict=True)]
    both.check_entries()


def _pending(device, steps, ratio, *, form, dtype, simulate, width=128):
    both = _Both(device, form, 64, width, ratio, dtype, simulate)
    ape = both.randn(ratio, width)
    pending, got_pending = _states(4, 3, width, device=device)
    context = [0] * len(steps[0])
    for sizes in steps:
        index = batch(list(zip(context, sizes, strict=True)))
        index.page_table.copy_(torch.arange(9).view(3, 3)[:, : index.page_table.shape[1]])
        index.slot_ids_B.copy_(torch.tensor([3, 0, 2])[: len(sizes)])
        value, score = both.projected(index.num_tokens, width)
        there = [tensor.to(device) for tensor in (value, score, ape)]
        compress_pending_triton(*there, got_pending, moved(index, device), both.moved_target, dtype)
        compress_pending_ref(value, score, ape, pending, index, both.target, dtype)
        torch.testing.assert_close(got_pending.cpu(), pending, rtol=1e-5, atol=1e-5, equal_nan=True)
        context = [c + n for c, n in zip(context, sizes, strict=True)]
    both.check_entries()


@pytest.mark.parametrize(
    ("form", "rope", "dtype", "simulate"),
    [
        ("f32", 64, torch.float32, False),
        ("bf16", 64, torch.bfloat16, False),
        ("kv_fp8", 64, torch.bfloat16, True),
        ("key_mxfp4", 0, torch.bfloat16, True),
        ("key_fp8", 0, torch.bfloat16, True),
        ("bf16", 0, torch.bfloat16, True),
    ],
)
def test_overlapping_state_and_entries_follow_the_twin(device, form, rope, dtype, simulate):
    steps = STEPS if form == "f32" else SHORT
    _overlapping(device, steps, form=form, rope=rope, dtype=dtype, simulate=simulate)


@pytest.mark.parametrize(
    ("form", "dtype", "ratio"),
    [("f32", torch.float32, 8), ("kv_fp8", torch.bfloat16, 16), ("bf16", torch.bfloat16, 32)],
)
def test_pending_state_and_entries_follow_the_twin(device, form, dtype, ratio):
    _pending(device, STEPS, ratio, form=form, dtype=dtype, simulate=form == "kv_fp8")


@pytest.mark.interpreter
def test_programs_may_run_in_any_order(device, monkeypatch):
    builder = type(interpreter.interpreter_builder)
    forward = builder.set_grid_idx

    def backward(self, x, y, z):
        forward(self, self.grid_dim[0] - 1 - x, self.grid_dim[1] - 1 - y, self.grid_dim[2] - 1 - z)

    monkeypatch.setattr(builder, "set_grid_idx", backward)
    _overlapping(device, STEPS, form="f32", rope=64, dtype=torch.float32, simulate=False)
    _pending(device, STEPS, 8, form="f32", dtype=torch.float32, simulate=False)


def test_a_pass_without_tokens_changes_nothing(device):
    _overlapping(device, [(0, 0, 0)], form="f32", rope=64, dtype=torch.float32, simulate=False)
    _pending(device, [(0, 0, 0)], 8, form="f32", dtype=torch.float32, simulate=False)


def test_pools_of_other_widths_are_left_to_the_twin(device):
    target = EntryTarget(torch.ones(128), torch.ones(32), pool(1, 4, 128, "f32", 64), 1e-6, False)
    assert fits_gpu(128, target)
    assert not fits_gpu(64, target)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["kv_fp8", "key_mxfp4", "key_fp8"])
def test_overlapping_at_the_released_sizes(device, form):
    key = form != "kv_fp8"
    _overlapping(
        device, STEPS, form=form, rope=0 if key else 64, dtype=torch.bfloat16, simulate=True, width=128 if key else 512
    )


@pytest.mark.gpu
def test_pending_at_the_released_size(device):
    _pending(device, STEPS, 32, form="kv_fp8", dtype=torch.bfloat16, simulate=True, width=512)
