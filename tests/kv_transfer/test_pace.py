import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.pace import Pace

MIB = 1 << 20


def paced(rate: float, seconds: float = 1.0, num_cores: int = 2) -> Pace:
    """After reading at `rate` bytes a second until `seconds`."""
    pace = Pace(num_cores)
    pace.begin(0.0)
    pace.arrive(int(rate * seconds), 0, seconds)
    return pace


@pytest.mark.parametrize("actual_rate", [0.8e9, 1.5e9, 3e9])
def test_the_end_of_a_read_is_seen_soon_with_few_looks_although_rates_change(actual_rate):
    for num_bytes in (1 * MIB, 8 * MIB, 200 * MIB):
        pace = paced(1.5e9)
        began = now = 5.0
        pace.begin(now)
        ends_at, looks = began + num_bytes / actual_rate, 0
        while now < ends_at:
            now += pace.nap_s(now, num_bytes, num_bytes)
            looks += 1
        assert now - ends_at < max(0.0002, 0.06 * (ends_at - began))
        assert looks < 150


def test_where_cores_are_many_an_end_is_seen_sooner():
    few, many = (paced(8e9, num_cores=cores).nap_s(1.0, MIB // 8, MIB // 8) for cores in (4, 5))
    assert many < few / 2


@pytest.mark.parametrize(("num_cores", "shortest_s"), [(2, 0.00005), (64, 0.00004)])
@given(st.floats(1e6, 1e12), st.floats(0.0, 10.0), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_no_pause_is_so_long_that_a_deadline_or_so_short_that_the_machine_notices(
    num_cores, shortest_s, rate, later, flying, more
):
    nap_s = paced(rate, num_cores=num_cores).nap_s(1.0 + later, flying, flying + more)
    assert shortest_s <= nap_s <= 0.004


def test_reads_under_way_are_looked_at_before_they_run_dry():
    assert paced(1e9).nap_s(1.0, 2 * MIB, 1000 * MIB) < 2 * MIB / 1e9 / 2


def test_what_is_late_is_looked_at_less_and_less_often():
    pace = paced(1e9)
    naps = [pace.nap_s(1.001 + late, MIB, MIB) for late in (0.0005, 0.005, 0.05, 1.0)]
    assert naps == sorted(naps)
    assert naps[0] < 0.0002
    assert naps[-1] == 0.004


def test_a_rate_that_changed_is_learned():
    pace = paced(1e9, 10.0)
    now = 10.0
    for _ in range(400):
        now += 0.01
        pace.arrive(1_000_000, 0, now)
    assert pace.nap_s(now, 1_000_000, 1_000_000) > 0.0015


def test_time_without_reads_does_not_count():
    pace = paced(1e9)
    pace.begin(100.0)
    pace.arrive(MIB, MIB, 100.0 + MIB / 1e9)
    assert abs(pace.nap_s(100.0 + MIB / 1e9, MIB, MIB) - MIB / 1e9 / 4) < 1e-6
