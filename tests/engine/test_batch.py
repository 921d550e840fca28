"""A step's tensors say what rows and chunks say, whatever was laid out in the same memory before."""

import numpy as np
import pytest
import torch

from engine.batch import BatchBuilder, Chunk, PaddedShape
from engine.page_pool import PagePool
from engine.pools import StatePools
from engine.request import Request
from engine.rows import Rows
from engine.slot_pool import SlotPool
from tests.engine.harness import submit

PAGE = 16
SPARE = 99


@pytest.fixture
def builder():
    made = BatchBuilder(64, 8, 5, torch.device("cpu"), spare_slot=SPARE)
    for array in made._arena.lay_out([])[0]:
        array[:] = -7
    for host in made._arena._hosts:
        host.fill_(0x7F)
    return made


@pytest.fixture
def pools():
    return StatePools(PagePool(40, PAGE), SlotPool(10))


def request_of(pools, number, num_tokens):
    request = Request(submit(f"r{number}", range(10 * number + 2, 10 * number + 2 + num_tokens)), number, None)
    request.state = pools.take(request.request_id, num_tokens)
    return request


def decoding(pools, lengths):
    rows = Rows(8, 5)
    for number, length in enumerate(lengths):
        request = request_of(pools, number, length)
        row = rows.add(request, length - 1, 100)
        rows.token[row] = 500 + number
    return rows


@pytest.mark.parametrize("width_step", [1, 16])
def test_decode_tokens_come_first_then_chunks(builder, pools, width_step):
    builder._width_step = 1 if width_step == 1 else 4
    rows = decoding(pools, [20, 3])
    late = request_of(pools, 5, 40)
    late.num_computed = 16
    step = builder.build(rows, 2, [Chunk(late, 24, range(30, 32))])
    batch = step.batch
    assert batch.token_ids.tolist() == [500, 501, *late.prompt[16:40].tolist()]
    assert batch.positions.tolist() == [19, 2, *range(16, 40)]
    assert batch.query_start.tolist() == [0, 1, 2, 26]
    assert batch.context_len.tolist() == [19, 2, 16]
    assert batch.token_request.tolist() == [0, 1, *[2] * 24]
    assert batch.slot_ids.tolist() == [r.owned.slot_id for r in (*rows.requests, late)]
    assert batch.logits_rows.tolist() == [0, 1, 25, 2 + 14, 2 + 15]
    assert batch.page_table.shape[1] == (3 if width_step == 1 else 4)
    for line, request in zip(batch.page_table.tolist(), (*rows.requests, late), strict=True):
        pages = request.owned.page_ids
        assert line[: len(pages)] == pages
        assert all(0 <= page < 40 for page in line)
    assert (step.source, step.shape, batch.one_token_each) == (None, None, False)


def test_padding_has_the_spare_slot_no_context_and_no_source(builder, pools):
    rows = decoding(pools, [20, 3, 33])
    rows.source[1] = 2
    step = builder.build(rows, 3, [], PaddedShape(6, 5))
    batch = step.batch
    assert batch.token_ids.tolist()[3:] == batch.positions.tolist()[3:] == batch.context_len.tolist()[3:] == [0, 0, 0]
    assert batch.slot_ids.tolist()[3:] == [SPARE] * 3
    assert batch.query_start.tolist() == list(range(7))
    assert batch.logits_rows.tolist() == batch.token_request.tolist() == list(range(6))
    assert step.source.tolist() == [-1, 2, -1, -1, -1, -1]
    assert batch.page_table[3:].eq(0).all()
    assert batch.one_token_each
    assert np.array_equal(batch.page_table[2, :3].numpy(), rows.requests[2].owned.page_ids)
    where = [tensor.data_ptr() for tensor in (batch.token_ids, batch.page_table)]
    builder.build(rows, 2, [])
    empty = builder.padding(PaddedShape(6, 5))
    assert where == [tensor.data_ptr() for tensor in (empty.batch.token_ids, empty.batch.page_table)]
    assert empty.source.tolist() == [-1] * 6


def test_a_step_without_anything_has_empty_tensors(builder, pools):
    batch = builder.build(Rows(8, 5), 0, []).batch
    assert (len(batch.token_ids), len(batch.slot_ids), batch.query_start.tolist()) == (0, 0, [0])
