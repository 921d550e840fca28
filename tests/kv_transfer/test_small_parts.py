"""The parts without I/O: leases, quarantine, memory of ended transfers, pieces, formats, checksums, configuration."""

import re
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.checksums import StateSums, first_mismatch
from kv_transfer.config import TransferConfig
from kv_transfer.format import StateFormat
from kv_transfer.hello import disagreement
from kv_transfer.lease import ReaderLease
from kv_transfer.messages import Checksums, Hello
from kv_transfer.pieces import Piece, plan_records, split
from kv_transfer.quarantine import Quarantine
from kv_transfer.regions import HOST_MEMORY, MemoryRegion
from kv_transfer.remembered import Remembered
from kv_transfer.threads import sleep_precisely


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_counts_from_before_the_question_was_sent():
    lease = ReaderLease(margin_s=1.0, length_s=10.0)
    ask = lease.ask(100.0)
    assert not lease.covers(100.0)
    lease.grant(ask, 10.0)
    assert lease.covers(109.0)
    assert not lease.covers(109.1)


def test_a_late_answer_to_an_old_question_never_extends_a_lease():
    lease = ReaderLease(margin_s=1.0, length_s=10.0)
    first, second = lease.ask(100.0), lease.ask(105.0)
    lease.grant(second, 10.0)
    lease.grant(first, 10.0)
    assert lease.end == 114.0
    lease.grant(99, 1000.0)
    assert lease.end == 114.0


def test_short_leases_are_renewed_more_often_and_keep_most_of_their_length():
    long, short = ReaderLease(margin_s=1.0, length_s=10.0), ReaderLease(margin_s=1.0, length_s=1.0)
    long.ask(100.0)
    assert not long.should_renew(102.4)
    assert long.should_renew(102.5)
    short.grant(short.ask(100.0), 1.0)
    assert short.end == 100.75
    assert short.should_renew(100.25)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=30))
def test_a_lease_is_never_longer_than_its_latest_question_allows(steps):
    lease = ReaderLease(margin_s=0.5, length_s=10.0)
    now, sent = 0.0, {}
    granted = 0
    for number, passed in steps:
        now += passed
        if number not in sent and number == len(sent) + 1:
            sent[lease.ask(now)] = now
        elif number in sent:
            lease.grant(number, 10.0)
            granted = max(granted, number)
    assert lease.end == (sent[granted] + 9.5 if granted else None)


def test_quarantine_counts_pages_and_age_and_finds_a_page_held_twice():
    clock = Clock()
    quarantine = Quarantine(clock)
    quarantine.enter("a", [1, 2], 0)
    clock.now += 3.0
    quarantine.enter("b", [3], 1)
    assert (quarantine.num_pages, quarantine.oldest_s) == (3, 3.0)
    quarantine.check_integrity()
    quarantine.enter("c", [2], 2)
    with pytest.raises(AssertionError, match="record 2 is quarantined for a and c"):
        quarantine.check_integrity()
    assert quarantine.leave("a") == 3.0
    quarantine.check_integrity()
    assert quarantine.num_pages == 2


def test_ended_transfers_are_forgotten_by_age_and_by_number():
    clock = Clock()
    remembered = Remembered[int](clock, keep_s=10.0, max_entries=3)
    for n in range(5):
        remembered.put(str(n), n)
    assert [remembered.get(str(n)) for n in range(5)] == [None, None, 2, 3, 4]
    clock.now += 5.0
    remembered.put("2", 22)
    clock.now += 6.0
    assert [remembered.get(str(n)) for n in range(5)] == [None, None, 22, None, None]
    assert remembered.pop("2") == 22
    assert len(remembered) == 0


REGION = MemoryRegion(1 << 20, 1000, 64)
REMOTE = MemoryRegion(1 << 30, 1000, 64)


@given(
    st.lists(
        st.tuples(st.integers(0, 63), st.integers(0, 63)), unique_by=(lambda t: t[0], lambda t: t[1]), max_size=64
    ),
    st.sampled_from([4096, 8192, 1 << 16]),
)
def test_pieces_cover_every_byte_once_and_stay_small(pairs, max_bytes):
    mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    pieces = split(plan_records(REGION, mine, REMOTE, theirs), max_bytes)
    covered = {}
    for piece in pieces:
        assert 0 < piece.num_bytes <= max_bytes
        for offset in range(piece.num_bytes):
            assert piece.local + offset not in covered
            covered[piece.local + offset] = piece.remote + offset
    wanted = {REGION.address(a) + i: REMOTE.address(b) + i for a, b in pairs for i in range(1000)}
    assert covered == wanted


def test_neighbours_become_one_read_and_a_large_record_several():
    assert plan_records(REGION, [3, 4, 5], REMOTE, [7, 8, 9]) == [Piece(REGION.address(3), REMOTE.address(7), 3000)]
    assert len(plan_records(REGION, [3, 4, 5], REMOTE, [9, 8, 7])) == 3
    assert len(plan_records(REGION, [3, 4, 6], REMOTE, [7, 8, 9])) == 2
    parts = list(split([Piece(4096, 8192, 4_500_000)], 1 << 20))
    assert len(parts) == 5
    assert max(part.num_bytes for part in parts) - min(part.num_bytes for part in parts) < 5 * 4096


def test_a_record_outside_its_region_is_refused():
    with pytest.raises(ValueError, match="record 64 of a region of 64"):
        plan_records(REGION, [0], REMOTE, [64])
    with pytest.raises(ValueError, match="record 64 of a region of 64"):
        plan_records(REGION, [0, 1], REMOTE, [63, 64])
    with pytest.raises(ValueError, match="record -1 of a region of 64"):
        plan_records(REGION, [-1], REMOTE, [0])


FORMAT = StateFormat(
    model_fingerprint="m",
    layout={"regions": [{"kind": "csa", "offset": 0}, {"kind": "hca", "offset": 512}]},
    page_bytes=1024,
    slot_bytes=2048,
    page_tokens=256,
)


def test_equal_formats_have_equal_digests_whatever_the_order_of_keys():
    reordered = msgspec.structs.replace(
        FORMAT, layout={"regions": [{"offset": 0, "kind": "csa"}, {"offset": 512, "kind": "hca"}]}
    )
    assert reordered.digest == FORMAT.digest
    assert FORMAT.mismatch(reordered) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_fingerprint": "n"}, "model_fingerprint: 'm' here, 'n' there"),
        ({"page_bytes": 1025}, "page_bytes: 1024 here, 1025 there"),
        (
            {"layout": {"regions": [{"kind": "csa", "offset": 0}, {"kind": "hca", "offset": 576}]}},
            r"layout.regions\[1\].offset: 512 here, 576 there",
        ),
    ],
)
def test_a_mismatch_names_both_values(change, named):
    other = msgspec.structs.replace(FORMAT, **change)
    assert other.digest != FORMAT.digest
    message = FORMAT.mismatch(other)
    assert message is not None
    assert re.search(named, message)


@pytest.mark.parametrize("verify", ["sample", "full"])
async def test_checksums_find_a_changed_byte_and_nothing_else(verify):
    memory = np.arange(20 * 64, dtype=np.uint8).reshape(20, 64)
    pages, slots = MemoryRegion(memory.ctypes.data, 64, 19), MemoryRegion(memory.ctypes.data + 19 * 64, 64, 1)
    order = [5, 1, 18, 0, 7, 2, 3, 4, 6, 8, 17]
    sums = StateSums(verify, pages, slots, HOST_MEMORY.read)
    sums.add_pages(order[:4], last=False)
    sums.add_pages(order[4:], last=True)
    told = sums.finish(0)
    assert [position for position, _ in told.pages] == (list(range(11)) if verify == "full" else [7, 10])
    assert await first_mismatch(told, pages, order, slots, 0, HOST_MEMORY.read) is None
    memory[order[7], 63] ^= 1
    message = await first_mismatch(told, pages, order, slots, 0, HOST_MEMORY.read)
    assert message is not None
    assert "page 7 of 11" in message
    memory[order[7], 63] ^= 1
    memory[19, 0] ^= 1
    assert "slot" in (await first_mismatch(told, pages, order, slots, 0, HOST_MEMORY.read) or "")
    assert "page 99" in (
        await first_mismatch(Checksums(None, ((99, 0),)), pages, order, slots, 0, HOST_MEMORY.read) or ""
    )


def test_no_checksums_are_taken_when_nobody_asked():
    pages = MemoryRegion(4096, 64, 4)  # never read
    sums = StateSums("off", pages, pages, HOST_MEMORY.read)
    sums.add_pages([0, 1, 2], last=True)
    assert sums.finish(0) == Checksums()


HELLO = Hello(
    epoch="e",
    session_id="h:1",
    transport="tcp",
    engine_version="mooncake-transfer-engine 0.3.13.post1",
    format_digest="d",
    format_summary="ours",
    pages=REGION,
    slots=REGION,
    lease_s=10.0,
)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"transport": "rdma"}, ("tcp", "rdma")),
        ({"format_digest": "x", "format_summary": "theirs"}, ("ours", "theirs")),
        ({"pages": MemoryRegion(1, 999, 5)}, ("1000", "999")),
        ({"slots": MemoryRegion(1, 998, 5)}, ("1000", "998")),
        ({"engine_version": "mooncake 0.3.12"}, ("0.3.12",)),
        ({"engine_version": "unknown"}, ("unknown",)),
    ],
)
def test_ranks_that_cannot_work_together_say_why(change, named):
    message = disagreement(HELLO, msgspec.structs.replace(HELLO, **change))
    assert message is not None
    assert all(word in message for word in named)


@pytest.mark.parametrize("version", ["mooncake 0.3.13.post1", "mooncake-cuda13 0.3.14", "mooncake 1.0"])
def test_newer_engines_work_together(version):
    assert disagreement(HELLO, msgspec.structs.replace(HELLO, engine_version=version)) is None


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"port_range": (15000, 15010)}, "port_range"),
        ({"port_range": (15000, 70000)}, "port_range"),
        ({"handoff_port": 70000}, "handoff_port"),
        ({"lease_s": 1.0, "lease_margin_s": 0.6}, "lease_margin_s"),
        ({"lease_s": 0.5, "lease_margin_s": 0.1}, "lease_s"),
        ({"claim_wait_s": 0}, "claim_wait_s"),
        ({"window": 5000}, "window"),
        ({"max_read_bytes": 4096}, "max_read_bytes"),
        ({"lanes_per_peer": 17}, "lanes_per_peer"),
        ({"tcp_io_threads": 0}, "tcp_io_threads"),
        ({"devices": ("mlx5_0",)}, "devices"),
        ({"host": "0.0.0.0"}, "host"),
        ({"transport": "nvlink"}, "transport"),
        ({"leese_s": 3}, "leese_s"),
    ],
)
def test_a_bad_setting_is_refused_by_name(setting, named):
    with pytest.raises((ValueError, msgspec.ValidationError), match=named):
        msgspec.convert(setting, TransferConfig)


def test_only_the_thread_that_asks_for_it_sleeps_precisely():
    slack_ns: dict[str, int] = {}

    def look(name: str) -> None:
        slack_ns[name] = int(Path(f"/proc/{threading.get_native_id()}/timerslack_ns").read_text())

    def sleeper() -> None:
        sleep_precisely()
        look("precise")

    look("before")
    thread = threading.Thread(target=sleeper)
    thread.start()
    thread.join()
    look("after")
    assert slack_ns["precise"] == 1_000
    assert slack_ns["after"] == slack_ns["before"] > 1_000
