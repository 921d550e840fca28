"""The hand-off service against peers that break the rules, and behind mutual TLS."""

from pathlib import Path

import grpc
import grpc.aio
import pytest

from kv_transfer.lane import open_lane
from proto import handoff_pb2 as pb
from proto import handoff_pb2_grpc as pb_grpc

TLS = Path(__file__).with_name("tls")
REGION = pb.Region(base_address=4096, stride_bytes=1 << 16, count=4)


@pytest.fixture
def prefill(spawn_peer):
    return spawn_peer(connect_timeout_s=0.5, lease_s=1.0, lease_margin_s=0.2)


async def converse(address: str, *messages: pb.ToPrefill, lane: tuple[bytes, ...] = (), keep_open_s: float = 5.0):
    """Say these things, hear everything until the service ends the stream: (answers, status, details).

    lane: what is said on the lane that the answer to Hello offers.
    """
    answers = []
    async with grpc.aio.insecure_channel(address) as channel:
        call = pb_grpc.HandoffStub(channel).Converse(timeout=keep_open_s)
        try:
            for message in messages:
                await call.write(message)
            while (answer := await call.read()) is not grpc.aio.EOF:
                answers.append(answer)
                if lane:
                    host, _, _ = address.rpartition(":")
                    opened = await open_lane(host, answer.hello.lane_port, answer.hello.lane_key, None)
                    for frame in lane:
                        opened.send(frame)
        except grpc.aio.AioRpcError:
            pass
        return answers, await call.code(), await call.details()


async def test_a_stream_that_does_not_begin_with_hello_is_ended(prefill):
    claim = pb.ToPrefill(claim=pb.Claim(transfer_id="t", num_tokens=1))
    assert await converse(prefill.address, claim) == (
        [],
        grpc.StatusCode.INVALID_ARGUMENT,
        "the stream must begin with Hello",
    )
    prefill.audit()


async def test_a_silent_stream_is_ended_after_the_deadline(prefill):
    _, code, details = await converse(prefill.address)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "no Hello within 0.5 s" in details


async def test_an_incompatible_rank_is_told_what_differs(prefill):
    hello = pb.Hello(epoch="e", session_id="h:1", transport="rdma", pages=REGION, slots=REGION, lease_seconds=1.0)
    _, code, details = await converse(prefill.address, pb.ToPrefill(hello=hello))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "tcp here, rdma at h:1" in details


def hello_to(prefill) -> pb.ToPrefill:
    return pb.ToPrefill(
        hello=pb.Hello(
            epoch="e",
            session_id="h:1",
            transport="tcp",
            engine_version="mooncake 0.3.14",
            format_digest=prefill.format_digest,
            pages=REGION,
            slots=pb.Region(base_address=4096, stride_bytes=1 << 18, count=4),
            lease_seconds=1.0,
        )
    )


@pytest.mark.parametrize("nonsense", ["nothing", "no id", "second hello", "no message"])
async def test_nonsense_after_hello_ends_the_conversation_and_frees_its_claim(prefill, spawn_peer, nonsense):
    bad = {
        "nothing": pb.ToPrefill().SerializeToString(),
        "no id": pb.ToPrefill(claim=pb.Claim(transfer_id="", num_tokens=1)).SerializeToString(),
        "second hello": hello_to(prefill).SerializeToString(),
        "no message": b"\xff\xff\xff",
    }
    prefill.send("t", 10, [0], 0)
    claim = pb.ToPrefill(claim=pb.Claim(transfer_id="t", attempt=1, ask=1, num_tokens=10, prompt_hash=b"hash"))
    answers, code, _ = await converse(
        prefill.address, hello_to(prefill), lane=(claim.SerializeToString(), bad[nonsense])
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [answer.hello.epoch for answer in answers] == [prefill.epoch]
    prefill.audit()
    decode = spawn_peer()
    decode.receive("t", prefill, 10, [0], 0)
    decode.events("Received")
    prefill.events("SendEnded")
    prefill.audit()


async def test_a_stream_without_a_lane_is_ended_after_the_deadline(prefill):
    answers, code, details = await converse(prefill.address, hello_to(prefill))
    assert len(answers) == 1
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "no lane within 0.5 s of Hello" in details


async def test_a_claim_on_the_stream_instead_of_the_lane_ends_the_conversation(prefill):
    claim = pb.ToPrefill(claim=pb.Claim(transfer_id="t", attempt=1, ask=1, num_tokens=10))
    _, code, details = await converse(prefill.address, hello_to(prefill), claim, lane=(claim.SerializeToString(),))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "the lane is where to speak" in details


def tls(prefix: str = "", ca: str = "") -> dict[str, str]:
    return {
        "cert": str(TLS / f"{prefix}rank.pem"),
        "key": str(TLS / f"{prefix}rank.key"),
        "ca": str(TLS / f"{ca}ca.pem"),
        "server_name": "rank.test",
    }


def test_ranks_with_certificates_of_one_authority_exchange_state(spawn_peer):
    prefill, decode = spawn_peer(tls=tls()), spawn_peer(tls=tls())
    prefill.send("t", 600, [0, 1, 2], 0)
    decode.receive("t", prefill, 600, [5, 6, 7], 1)
    decode.events("Received")
    assert decode.do("digest", [5, 6, 7], 1) == prefill.do("digest", [0, 1, 2], 0)


def test_a_rank_without_the_right_certificate_gets_nothing(spawn_peer):
    prefill = spawn_peer(tls=tls(), hold_unclaimed_s=20.0)
    prefill.send("t", 10, [0], 0)
    for stranger in (spawn_peer(connect_timeout_s=1.0), spawn_peer(tls=tls("other-"), connect_timeout_s=1.0)):
        stranger.receive("t", prefill, 10, [0], 0)
        failed, _ = stranger.events("ReceiveFailed", "Quiet")
        assert failed["retryable"]
        stranger.audit()
    prefill.no_event(0.1)
    prefill.audit()


def test_a_missing_certificate_is_named_at_the_start(spawn_peer):
    broken = tls() | {"key": "/nowhere/rank.key"}
    with pytest.raises(AssertionError, match="the process ended with 1"):
        spawn_peer(tls=broken)
