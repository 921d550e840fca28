"""Whole hand-offs between real processes over real Mooncake TCP: bytes, payloads, order, refusals."""

import pytest


def pages_of(num_tokens: int) -> int:
    return -(-num_tokens // 256)


@pytest.fixture(scope="module")
def shared_ranks(spawn_shared_peer):
    return spawn_shared_peer(num_pages=300, verify="full"), spawn_shared_peer(num_pages=300, verify="full")


@pytest.fixture
def ranks(shared_ranks):
    for rank in shared_ranks:
        rank.do("mark")
    yield shared_ranks
    for rank in shared_ranks:
        rank.do("settle")
        rank.audit()


def test_every_size_arrives_byte_for_byte(ranks):
    prefill, decode = ranks
    for n, num_tokens in enumerate([1, 255, 256, 257, 512, 700, 256 * 8, 256 * 9 + 1, 256 * 300]):
        transfer_id, count = f"{n:032x}", pages_of(num_tokens)
        theirs = list(range(count))[::-1] if n % 2 else list(range(count))
        mine = list(range(300 - count, 300))
        prefill.send(transfer_id, num_tokens, theirs, n % 4, seed=n)
        decode.receive(transfer_id, prefill, num_tokens, mine, (n + 1) % 4)
        (received,) = decode.events("Received")
        assert received["payload"] == "first token"
        assert received["num_bytes"] == count * (1 << 16) + (1 << 18)
        assert decode.do("digest", mine, (n + 1) % 4) == prefill.do("digest", theirs, n % 4)
        (ended,) = prefill.events("SendEnded")
        assert ended["outcome"] == "fetched"
    for rank in ranks:
        rank.audit()
        assert rank.do("stats")["recreations"] == 0


def test_a_claim_may_come_first_and_pages_are_read_while_the_rest_is_computed(ranks, transfer_id):
    prefill, decode = ranks
    decode.receive(transfer_id, prefill, 256 * 5, [10, 11, 12, 13, 14], 1)
    decode.no_event(0.2)
    prefill.do("fill", [0, 1, 2, 3, 4], 0, 7)
    prefill.call("open_send", transfer_id, 256 * 5, "hash")
    prefill.call("publish_pages", transfer_id, [0, 1])
    assert decode.do("wait_for_bytes", 2 << 16, 5.0)
    prefill.call("publish_pages", transfer_id, [2])
    assert decode.do("wait_for_bytes", 1 << 16, 5.0)
    decode.no_event(0.1)
    prefill.call("publish_ready", transfer_id, [3, 4], 0, "token")
    (received,) = decode.events("Received")
    assert received["exposed_s"] < received["transfer_s"], "only the last pages and the slot came after Ready"
    assert decode.do("digest", [10, 11, 12, 13, 14], 1) == prefill.do("digest", [0, 1, 2, 3, 4], 0)
    prefill.events("SendEnded")
    for rank in ranks:
        rank.audit()


def test_thirty_two_transfers_at_once_do_not_mix(spawn_peer):
    prefill = spawn_peer(num_pages=128, num_slots=32)
    decode = spawn_peer(num_pages=128, num_slots=32)
    ids = [f"{n:032x}" for n in range(32)]
    for n, transfer_id in enumerate(ids):
        prefill.do("fill", list(range(4 * n, 4 * n + 4)), n, n)
        if n % 2:
            decode.receive(transfer_id, prefill, 1000, list(range(4 * n, 4 * n + 4))[::-1], 31 - n)
        prefill.call("open_send", transfer_id, 1000, "hash")
    for n, transfer_id in enumerate(ids):
        prefill.call("publish_pages", transfer_id, [4 * n, 4 * n + 1])
        if not n % 2:
            decode.receive(transfer_id, prefill, 1000, list(range(4 * n, 4 * n + 4))[::-1], 31 - n)
    for n, transfer_id in reversed(list(enumerate(ids))):
        prefill.call("publish_ready", transfer_id, [4 * n + 2, 4 * n + 3], n, transfer_id)
    events = decode.events(*["Received"] * 32)
    assert {event["transfer_id"]: event["payload"] for event in events} == {t: t for t in ids}
    for n in range(32):
        mine = decode.do("digest", list(range(4 * n, 4 * n + 4))[::-1], 31 - n)
        assert mine == prefill.do("digest", list(range(4 * n, 4 * n + 4)), n)
    prefill.events(*["SendEnded"] * 32)
    prefill.audit()
    decode.audit()


def test_another_format_is_refused_and_both_are_named(spawn_peer, transfer_id):
    prefill, decode = spawn_peer(fingerprint="model-x"), spawn_peer(fingerprint="model-y")
    prefill.send(transfer_id, 10, [0], 0)
    decode.receive(transfer_id, prefill, 10, [0], 0)
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert not failed["retryable"]
    assert "model-x" in failed["message"]
    assert "model-y" in failed["message"]
    assert transfer_id in failed["message"]
    decode.audit()


def test_another_prompt_is_refused(ranks, transfer_id):
    prefill, decode = ranks
    prefill.send(transfer_id, 10, [0], 0)
    decode.call("open_receive", transfer_id, prefill.address, "", 10, "other", [0], 0)
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert not failed["retryable"]
    assert "prompt hashes differ" in failed["message"]
    decode.call("open_receive", transfer_id, prefill.address, "", 11, "hash", [0], 0)
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert "claimed 11 tokens, the prompt has 10" in failed["message"]
    decode.receive(transfer_id, prefill, 10, [0], 0)
    decode.events("Received")


def test_an_old_epoch_is_refused_at_once(ranks, transfer_id):
    prefill, decode = ranks
    prefill.send(transfer_id, 10, [0], 0)
    decode.call("open_receive", transfer_id, prefill.address, "f" * 32, 10, "hash", [0], 0)
    failed, _ = decode.events("ReceiveFailed", "Quiet", timeout_s=3.0)
    assert failed["retryable"]
    assert "f" * 32 in failed["message"]
    assert prefill.epoch in failed["message"]


def test_a_claim_whose_prefill_never_arrives_is_refused_after_the_wait(spawn_peer, transfer_id):
    prefill, decode = spawn_peer(claim_wait_s=0.5), spawn_peer()
    decode.receive(transfer_id, prefill, 10, [0], 0)
    failed, _ = decode.events("ReceiveFailed", "Quiet", timeout_s=5.0)
    assert failed["retryable"]
    assert "no prefill" in failed["message"]
    prefill.audit()
    decode.audit()


def test_a_state_that_nobody_claims_is_given_back_after_the_hold(spawn_peer, transfer_id):
    prefill = spawn_peer(hold_unclaimed_s=0.3)
    prefill.send(transfer_id, 10, [0], 0)
    (ended,) = prefill.events("SendEnded", timeout_s=3.0)
    assert ended["outcome"] == "expired"
    prefill.audit()


def test_release_reaches_a_transfer_that_exists_and_one_that_does_not_yet(ranks, transfer_id):
    prefill, decode = ranks
    prefill.send(transfer_id, 10, [0], 0)
    prefill.call("release", transfer_id)
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "released"
    decode.receive(transfer_id, prefill, 10, [0], 0)
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert not failed["retryable"]

    early = transfer_id[::-1]
    prefill.call("release", early)
    decode.call("release", early)
    prefill.call("open_send", early, 10, "hash")
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "released"
    decode.receive(early, prefill, 10, [0], 0)
    decode.events("ReceiveFailed", "Quiet")

    waiting = transfer_id[1:]
    decode.receive(waiting, prefill, 10, [0], 0)
    decode.no_event(0.1)
    prefill.call("release", waiting)
    failed, _ = decode.events("ReceiveFailed", "Quiet", timeout_s=3.0)
    assert "released" in failed["message"]
    for rank in ranks:
        rank.audit()


def test_a_cancelled_prefill_tells_the_decode_rank_at_once(ranks, transfer_id):
    prefill, decode = ranks
    prefill.call("open_send", transfer_id, 600, "hash")
    prefill.call("publish_pages", transfer_id, [0])
    decode.receive(transfer_id, prefill, 600, [0, 1, 2], 0)
    assert decode.do("wait_for_bytes", 1 << 16, 5.0)
    prefill.call("cancel_send", transfer_id, "the client went away")
    (ended,) = prefill.events("SendEnded")
    assert ended["outcome"] == "failed"
    failed, _ = decode.events("ReceiveFailed", "Quiet", timeout_s=3.0)
    assert "the client went away" in failed["message"]
    for rank in ranks:
        rank.audit()


def test_a_cancelled_receive_gives_its_pages_back_and_leaves_the_state_for_another(ranks, transfer_id):
    prefill, decode = ranks
    prefill.send(transfer_id, 256 * 200, list(range(200)), 0)
    decode.receive(transfer_id, prefill, 256 * 200, list(range(200)), 0)
    assert decode.do("wait_for_bytes", 1, 5.0)
    decode.call("cancel_receive", transfer_id)
    (event,) = decode.do("events", 1, 5.0)
    assert event["kind"] in ("Quiet", "Received")
    if event["kind"] == "Quiet":
        decode.audit()
        decode.receive(transfer_id, prefill, 256 * 200, list(range(100, 300)), 1)
        decode.events("Received")
        assert decode.do("digest", list(range(100, 300)), 1) == prefill.do("digest", list(range(200)), 0)
    prefill.events("SendEnded")
    for rank in ranks:
        rank.audit()


def test_bytes_that_changed_on_the_way_are_not_accepted(ranks, transfer_id):
    prefill, decode = ranks
    prefill.send(transfer_id, 600, [0, 1, 2], 0)
    prefill.audit()  # the sums are taken by now
    prefill.do("fill", [1], None, 99)
    decode.receive(transfer_id, prefill, 600, [0, 1, 2], 0)
    failed, _ = decode.events("ReceiveFailed", "Quiet")
    assert failed["retryable"]
    assert "page 1 of 3 has checksum" in failed["message"]
    for rank in ranks:
        rank.audit()
