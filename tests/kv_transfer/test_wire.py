import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import messages, wire
from kv_transfer.regions import MemoryRegion
from proto import handoff_pb2 as pb

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
regions = st.builds(MemoryRegion, st.integers(1, 2**63), st.integers(1, 2**40), st.integers(1, 2**32 - 1))
ids = st.text(min_size=1, max_size=wire.MAX_ID_CHARS)
common = {"transfer_id": ids, "attempt": u64}
leases = st.builds(messages.Lease, u64, st.floats(0.001, 86000))
pages = st.lists(u32, max_size=50).map(tuple)
hellos = st.builds(
    messages.Hello,
    epoch=st.text(min_size=1),
    session_id=st.integers(1, 65535).map("host:{}".format),
    transport=st.text(),
    engine_version=st.text(),
    format_digest=st.text(),
    format_summary=st.text(),
    pages=regions,
    slots=regions,
    lease_s=st.floats(0.001, 86000),
    lane_port=st.integers(0, 65535),
    lane_key=st.binary(max_size=32),
)
checksums = st.builds(messages.Checksums, st.none() | u64, st.lists(st.tuples(u32, u64), max_size=9).map(tuple))
to_prefill = st.one_of(
    hellos,
    st.builds(
        messages.Claim,
        **common,
        ask=u64,
        source_epoch=st.text(),
        num_tokens=st.integers(1, 2**32 - 1),
        prompt_hash=st.binary(),
    ),
    st.builds(messages.Renew, **common, ask=u64),
    st.builds(messages.Fetched, **common),
    st.builds(messages.Release, **common, reason=st.text()),
)
to_decode = st.one_of(
    hellos,
    st.builds(messages.Progress, **common, lease=leases, first_page=u32, pages=pages),
    st.builds(
        messages.Ready,
        **common,
        lease=leases,
        first_page=u32,
        pages=pages,
        slot=u32,
        payload=st.binary(),
        prompt_hash=st.binary(),
        checksums=checksums,
    ),
    st.builds(messages.Refuse, **common, reason=st.text(), retryable=st.booleans()),
)


@given(to_prefill)
def test_messages_to_prefill_survive_the_wire(message):
    sent = wire.encode_to_prefill(message).SerializeToString()
    assert wire.decode_to_prefill(pb.ToPrefill.FromString(sent)) == message


@given(to_decode)
def test_messages_to_decode_survive_the_wire(message):
    sent = wire.encode_to_decode(message).SerializeToString()
    assert wire.decode_to_decode(pb.ToDecode.FromString(sent)) == message


@pytest.mark.parametrize(
    "message",
    [
        pb.ToPrefill(),
        pb.ToPrefill(claim=pb.Claim(transfer_id="", num_tokens=1)),
        pb.ToPrefill(claim=pb.Claim(transfer_id="x" * 257, num_tokens=1)),
        pb.ToPrefill(claim=pb.Claim(transfer_id="x", num_tokens=0)),
        pb.ToPrefill(hello=pb.Hello(epoch="e", session_id="no port")),
        pb.ToPrefill(hello=pb.Hello(epoch="e", session_id="h:70000")),
        pb.ToPrefill(hello=pb.Hello(epoch="", session_id="h:1")),
        pb.ToPrefill(hello=pb.Hello(epoch="e", session_id="h:1")),
    ],
)
def test_what_is_not_a_legal_message_to_prefill_is_refused(message):
    with pytest.raises(wire.WireError):
        wire.decode_to_prefill(message)


def test_a_lane_at_an_impossible_port_is_refused():
    region = pb.Region(base_address=1, stride_bytes=1, count=1)
    hello = pb.Hello(epoch="e", session_id="h:1", pages=region, slots=region, lease_seconds=1.0, lane_port=65536)
    with pytest.raises(wire.WireError, match="65536 is not a port"):
        wire.decode_to_decode(pb.ToDecode(hello=hello))


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e9, float("nan"), float("inf")])
def test_a_lease_without_a_sensible_length_is_refused(seconds):
    with pytest.raises(wire.WireError, match="a lease of"):
        wire.decode_to_decode(pb.ToDecode(progress=pb.Progress(transfer_id="x", lease=pb.Lease(seconds=seconds))))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_decoded_but_never_crash(data):
    try:
        decoded = wire.decode_to_decode(wire.parse(pb.ToDecode, data))
    except wire.WireError:
        return
    assert isinstance(decoded, msgspec.Struct)
