"""What happens when a rank is killed, stopped and resumed, or restarted in the middle of a hand-off.

Big states, a narrow window and small reads make a transfer last long enough to be hit in the middle. Pages that were
given back are poisoned at once: a late read would show.
"""

import signal
import time

import pytest

TRANSFER = "0123456789abcdef0123456789abcdef"
COUNT = 240
NUM_TOKENS = 256 * COUNT
PAGES = list(range(COUNT))
BIG = {"num_pages": COUNT, "page_bytes": 1 << 19, "slot_bytes": 1 << 20}
SLOWLY = {"window": 1, "max_read_bytes": 1 << 16, "lanes_per_peer": 1}
SHORT = {
    "lease_s": 2.0,
    "lease_margin_s": 0.3,
    "read_deadline_s": 2.0,
    "hold_unclaimed_s": 2.0,
    "connect_timeout_s": 2.0,
}
PART = 8 << 20


@pytest.fixture
def start_transfer(spawn_peer):
    """A prefill rank, a decode rank, and a transfer between them that is under way."""

    def start(decode_config=SHORT, **prefill_config):
        prefill = spawn_peer(**BIG, **(SHORT | prefill_config))
        decode = spawn_peer(**BIG, **SLOWLY, **decode_config)
        prefill.send(TRANSFER, NUM_TOKENS, PAGES, 0)
        decode.receive(TRANSFER, prefill, NUM_TOKENS, PAGES, 1)
        assert decode.do("wait_for_bytes", PART, 10.0)
        return prefill, decode

    return start


def assert_next_transfer_works(prefill, decode):
    transfer_id = "a" * 32
    prefill.send(transfer_id, NUM_TOKENS, PAGES, 2, seed=5)
    decode.receive(transfer_id, prefill, NUM_TOKENS, PAGES, 2)
    decode.events("Received")
    assert decode.do("digest", PAGES, 2) == prefill.do("digest", PAGES, 2)
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "fetched"
    prefill.audit()
    decode.audit()


def test_prefill_killed_in_the_middle_and_restarted_on_the_same_port(start_transfer, spawn_peer):
    port = 20000 + time.monotonic_ns() % 10000
    prefill, decode = start_transfer(handoff_port=port)
    prefill.kill()
    began = time.monotonic()
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert time.monotonic() - began < 3.0
    assert failed["retryable"]
    decode.do("poison", PAGES, 1)
    restarted = spawn_peer(**BIG, **(SHORT | {"hold_unclaimed_s": 30.0}), handoff_port=port)
    assert restarted.address == prefill.address
    assert restarted.epoch != prefill.epoch
    restarted.send(TRANSFER, NUM_TOKENS, PAGES, 0, seed=2)
    decode.receive(TRANSFER, prefill, NUM_TOKENS, PAGES, 1)
    stale, _ = decode.events("ReceiveFailed", "Quiet")
    assert prefill.epoch in stale["message"]
    assert decode.do("is_poisoned", PAGES, 1)
    decode.audit()
    decode.receive(TRANSFER, restarted, NUM_TOKENS, PAGES, 1)
    decode.events("Received")
    assert decode.do("digest", PAGES, 1) == restarted.do("digest", PAGES, 0)
    restarted.events("SendEnded")
    assert_next_transfer_works(restarted, decode)


def test_prefill_stopped_in_the_middle_and_resumed_after_the_pages_were_reused(start_transfer):
    prefill, decode = start_transfer()
    prefill.signal(signal.SIGSTOP)
    began = time.monotonic()
    (failed,) = decode.events("ReceiveFailed")
    assert failed["retryable"]
    decode.events("Quiet")
    assert time.monotonic() - began < 8.0
    decode.do("poison", PAGES, 1)
    prefill.signal(signal.SIGCONT)
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "expired"
    time.sleep(1.0)
    assert decode.do("is_poisoned", PAGES, 1)
    assert_next_transfer_works(prefill, decode)
    stats = decode.do("stats")
    assert (stats["quarantined_pages"], stats["recreations"]) == (0, 0)


def test_decode_killed_in_the_middle_and_another_fetches_the_same_pages(start_transfer, spawn_peer):
    another = spawn_peer(**BIG, **SHORT)
    prefill, decode = start_transfer(hold_unclaimed_s=20.0)
    decode.kill()
    another.receive(TRANSFER, prefill, NUM_TOKENS, PAGES, 3)
    another.events("Received")
    assert another.do("digest", PAGES, 3) == prefill.do("digest", PAGES, 0)
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "fetched"
    assert_next_transfer_works(prefill, another)


def test_a_stopped_decode_rank_discards_what_it_read_when_its_lease_ran_out_meanwhile(start_transfer, spawn_peer):
    prefill, decode = start_transfer(hold_unclaimed_s=0.5)
    decode.signal(signal.SIGSTOP)
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "expired"
    prefill.do("poison", PAGES, 0)
    prefill.audit()
    decode.signal(signal.SIGCONT)
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert failed["retryable"]
    assert "lease" in failed["message"]
    assert_next_transfer_works(prefill, decode)


def test_a_newer_claim_takes_over_and_the_older_one_is_told(start_transfer, spawn_peer):
    another = spawn_peer(**BIG, **SHORT)
    prefill, decode = start_transfer()
    another.receive(TRANSFER, prefill, NUM_TOKENS, PAGES, 3)
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert "replaces this one" in failed["message"]
    another.events("Received")
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "fetched"
    for rank in (prefill, decode, another):
        rank.audit()


def test_a_release_in_the_middle_gives_both_sides_their_pages_back_at_once(start_transfer):
    prefill, decode = start_transfer()
    began = time.monotonic()
    prefill.call("release", TRANSFER)
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "released"
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert not failed["retryable"]
    assert time.monotonic() - began < 1.5, "the claimant's answer ends it, not its lease"
    assert_next_transfer_works(prefill, decode)


def test_reads_that_never_end_are_fenced_by_a_new_engine(start_transfer):
    patient = SHORT | {"read_deadline_s": 30.0, "recreate_after_s": 2.0}
    prefill, decode = start_transfer(patient, lease_s=20.0)
    epoch = decode.epoch
    prefill.signal(signal.SIGSTOP)
    failed, _, renewed = decode.events("ReceiveFailed", "Quiet", "EpochRenewed")
    assert "re-created" in failed["message"]
    assert renewed["epoch"] != epoch
    decode.do("poison", PAGES, 1)
    prefill.signal(signal.SIGCONT)
    prefill.events("SendEnded")
    assert decode.do("is_poisoned", PAGES, 1)
    assert decode.do("stats")["recreations"] == 1
    assert_next_transfer_works(prefill, decode)


def test_stopping_the_prefill_rank_ends_a_transfer_in_the_middle_without_a_wait(start_transfer):
    prefill, decode = start_transfer()
    began = time.monotonic()
    assert prefill.stop() == 0
    assert time.monotonic() - began < 5.0
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert failed["retryable"]
    decode.audit()


def test_cancels_and_releases_at_random_moments_leave_nothing_behind(spawn_peer):
    """Forty short transfers, each hit at another moment by another ending."""
    prefill = spawn_peer(num_pages=64, num_slots=4, **SHORT)
    decode = spawn_peer(num_pages=64, num_slots=4, **SHORT, **SLOWLY)
    for n in range(40):
        transfer_id = f"{n:032x}"
        decode.receive(transfer_id, prefill, 256 * 16, list(range(16)), 0)
        prefill.call("open_send", transfer_id, 256 * 16, "hash")
        prefill.call("publish_pages", transfer_id, list(range(8)))
        if n % 3:
            prefill.call("publish_ready", transfer_id, list(range(8, 16)), 1, "token")
        time.sleep(0.002 * (n % 7))
        endings = [(decode, "cancel_receive"), (prefill, "release"), (decode, "release"), (decode, "release")]
        rank, method = endings[n % 4]
        rank.call(method, transfer_id)
        if n % 4 != 1:
            prefill.call("release", transfer_id)
        prefill.events("SendEnded", timeout_s=5.0)
        kinds = {event["kind"] for event in decode.do("events", 1, 5.0)}
        if "ReceiveFailed" in kinds:
            decode.events("Quiet", timeout_s=5.0)
        else:
            assert kinds <= {"Quiet", "Received"}
        prefill.audit()
        decode.audit()
    prefill.send("a" * 32, 100, [0], 0)
    decode.receive("a" * 32, prefill, 100, [0], 0)
    while (event := decode.do("events", 1, 5.0)[0])["kind"] != "Received":
        pass
    assert event["transfer_id"] == "a" * 32
    assert decode.do("digest", [0], 0) == prefill.do("digest", [0], 0)
