"""The page and slot pools: nothing lost, nothing shared, whatever the order of operations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.page_pool import PagePool
from engine.pool import Holding, Pool, PoolCorrupted, PoolExhausted, Use
from engine.slot_pool import SlotPool


def test_fresh_holdings_are_runs_of_neighbours():
    pool = PagePool(10, page_tokens=256)
    first, second = pool.take("a", 3), pool.take("b", 4)
    assert first.ids == [0, 1, 2]
    assert second.ids == [3, 4, 5, 6]
    pool.give_back(first)
    assert pool.take("c", 2).ids == [0, 1]


def test_pages_for_counts_partial_pages():
    pool = PagePool(4, page_tokens=256)
    assert [pool.pages_for(n) for n in (0, 1, 255, 256, 257, 512)] == [0, 1, 1, 1, 2, 2]


def test_taking_too_many_changes_nothing_and_names_the_numbers():
    pool = SlotPool(2)
    pool.take("a", 1)
    with pytest.raises(PoolExhausted, match="b: 2 slots wanted, 1 of 2 free"):
        pool.take("b", 2)
    assert pool.num_free == 1
    pool.check_integrity()


def test_gauges_follow_the_use():
    pool = Pool("page", 8)
    holding = pool.take("r", 3)
    pool.assign(holding, Use.TRANSFER, "t")
    assert (pool.num_used(Use.REQUEST), pool.num_used(Use.TRANSFER), pool.num_free) == (0, 3, 5)
    pool.assign(holding, Use.QUARANTINE, "t")
    assert pool.num_used(Use.QUARANTINE) == 3
    pool.give_back(holding)
    assert (pool.num_used(Use.QUARANTINE), pool.num_free) == (0, 8)


def test_giving_back_twice_is_caught():
    pool = Pool("page", 2)
    holding = pool.take("r", 1)
    pool.give_back(holding)
    with pytest.raises(AssertionError, match="twice"):
        pool.give_back(holding)


def test_quarantine_is_left_only_to_be_free():
    pool = Pool("page", 2)
    holding = pool.take("r", 1)
    pool.assign(holding, Use.QUARANTINE, "t")
    with pytest.raises(AssertionError, match="quarantine"):
        pool.assign(holding, Use.REQUEST, "r")


def test_the_audit_names_a_leaked_holding_and_a_dangling_one():
    pool = Pool("page", 4)
    kept, leaked = pool.take("kept", 1), pool.take("leaked", 2)
    pool.check_integrity([kept, leaked])
    with pytest.raises(PoolCorrupted, match=r"held by nobody alive.*'leaked', \[1, 2\]"):
        pool.check_integrity([kept])
    pool.give_back(leaked)
    with pytest.raises(PoolCorrupted, match="after they were given back"):
        pool.check_integrity([kept, leaked])


def test_the_audit_names_shared_lost_and_invented_ids():
    pool = Pool("page", 4)
    first, second = pool.take("a", 1), pool.take("b", 1)
    second.ids.append(first.ids[0])
    with pytest.raises(PoolCorrupted, match="page 0 belongs to request a and to request b"):
        pool.check_integrity()
    second.ids.pop()
    third = pool.take("c", 1)
    third.ids.clear()
    with pytest.raises(PoolCorrupted, match=r"pages \[2\] are neither free nor held"):
        pool.check_integrity()
    third.ids.append(9)
    with pytest.raises(PoolCorrupted, match="page 9 of request c does not exist"):
        pool.check_integrity()


operations = st.lists(
    st.tuples(st.sampled_from(["take", "extend", "transfer", "request", "quarantine", "back"]), st.integers(0, 6)),
    max_size=60,
)


@given(operations)
def test_no_order_of_operations_loses_or_shares_an_id(steps):
    pool = Pool("page", 12)
    live: list[Holding] = []
    for number, (operation, argument) in enumerate(steps):
        holding = live[argument % len(live)] if live else None
        if operation == "take":
            if argument <= pool.num_free:
                live.append(pool.take(f"r{number}", argument))
            else:
                with pytest.raises(PoolExhausted):
                    pool.take(f"r{number}", argument)
        elif holding is None:
            continue
        elif operation == "extend" and holding.use is Use.REQUEST and pool.num_free:
            before = list(holding.ids)
            assert holding.ids == before + pool.extend(holding)
        elif operation in ("transfer", "request", "quarantine") and holding.use is not Use.QUARANTINE:
            pool.assign(holding, Use(operation), f"x{number}")
        elif operation == "back":
            live.remove(holding)
            pool.give_back(holding)
        pool.check_integrity(live)
    assert pool.num_free + sum(len(h.ids) for h in live) == pool.count
