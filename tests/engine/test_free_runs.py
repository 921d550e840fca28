"""Free ids: what is taken together lies together, also after the pool has been in use for long."""

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.free_runs import FreeRuns


def num_pieces(ids):
    return sum(index != before + 1 for before, index in zip([-2, *ids], ids, strict=False))


def test_the_shortest_run_that_holds_all_is_taken_and_of_equal_ones_the_first():
    free = FreeRuns(20)
    assert free.take(20) == list(range(20))
    free.give_back([0, 1, 2, 3, 4, 8, 9, 14, 15])
    assert free.num_runs == 3
    assert free.take(2) == [8, 9]
    assert free.take(1) == [14]
    assert free.take(3) == [0, 1, 2]
    assert sorted(free) == [3, 4, 15]


def test_without_a_run_that_is_long_enough_the_longest_ones_are_joined():
    free = FreeRuns(20)
    free.take(20)
    free.give_back([0, 1, 2, 5, 6, 7, 8, 11, 15, 16])
    assert free.take(7) == [5, 6, 7, 8, 0, 1, 2]
    assert sorted(free) == [11, 15, 16]


@given(st.lists(st.integers(0, 6), max_size=40), st.randoms(use_true_random=False))
def test_it_is_a_set_of_ids_whose_runs_never_touch(counts, rng):
    free, taken = FreeRuns(24), []
    for count in counts:
        if count and len(free) >= count:
            taken.append(free.take(count))
            assert len(taken[-1]) == count
        elif taken:
            ids = taken.pop(rng.randrange(len(taken)))
            rng.shuffle(ids)
            free.give_back(ids)
        held = [index for ids in taken for index in ids]
        assert sorted([*free, *held]) == list(range(24))
        assert len(free) == 24 - len(held)
        there = sorted(free)
        assert free.num_runs == num_pieces(there)
    for ids in taken:
        free.give_back(ids)
    assert (free.num_runs, len(free)) == (1, 24)


def test_states_stay_in_one_piece_in_a_pool_that_is_nearly_full_for_long():
    rng = random.Random(1)
    free, live, pieces = FreeRuns(4000), [], []
    for step in range(3000):
        count = min(256, max(1, round(rng.lognormvariate(3, 1))))
        while len(free) < count + 200:
            free.give_back(live.pop(rng.randrange(len(live))))
        live.append(free.take(count))
        if len(free) > 200:
            live[rng.randrange(len(live))] += free.take(1)  # somebody's answer grows
        if step > 1000:
            pieces.append(num_pieces(live[-1]))
    assert sum(pieces) / len(pieces) < 1.5
