"""Messages <-> protobuf, the only place that knows both. Decoding checks everything a peer could get wrong."""

from typing import TypeVar

from google.protobuf.message import DecodeError

from kv_transfer.messages import (
    Checksums,
    Claim,
    Fetched,
    Hello,
    Lease,
    Progress,
    Ready,
    Refuse,
    Release,
    Renew,
    ToDecode,
    ToPrefill,
)
from kv_transfer.regions import MemoryRegion
from proto import handoff_pb2 as pb

MAX_ID_CHARS = 256
M = TypeVar("M", pb.ToPrefill, pb.ToDecode)


class WireError(ValueError):
    """A peer sent something that is not a legal message."""


def check_id(transfer_id: str) -> str:
    if not 0 < len(transfer_id) <= MAX_ID_CHARS:
        raise WireError(f"transfer id of {len(transfer_id)} characters: 1..{MAX_ID_CHARS} are allowed")
    return transfer_id


def parse(kind: type[M], frame: bytes) -> M:
    """The protobuf message in a frame of a lane; WireError if there is none."""
    try:
        return kind.FromString(frame)
    except DecodeError:
        raise WireError(f"a frame of {len(frame)} bytes that is no {kind.DESCRIPTOR.name}") from None


def encode_to_prefill(message: ToPrefill) -> pb.ToPrefill:
    match message:
        case Claim():
            return pb.ToPrefill(
                claim=pb.Claim(
                    transfer_id=message.transfer_id,
                    attempt=message.attempt,
                    ask=message.ask,
                    source_epoch=message.source_epoch,
                    num_tokens=message.num_tokens,
                    prompt_hash=message.prompt_hash,
                )
            )
        case Renew(transfer_id=transfer_id, attempt=attempt, ask=ask):
            return pb.ToPrefill(renew=pb.Renew(transfer_id=transfer_id, attempt=attempt, ask=ask))
        case Fetched(transfer_id=transfer_id, attempt=attempt):
            return pb.ToPrefill(fetched=pb.Fetched(transfer_id=transfer_id, attempt=attempt))
        case Release(transfer_id=transfer_id, attempt=attempt, reason=reason):
            return pb.ToPrefill(release=pb.Release(transfer_id=transfer_id, attempt=attempt, reason=reason))
        case Hello():
            return pb.ToPrefill(hello=_encode_hello(message))


def encode_to_decode(message: ToDecode) -> pb.ToDecode:
    match message:
        case Progress():
            return pb.ToDecode(
                progress=pb.Progress(
                    transfer_id=message.transfer_id,
                    attempt=message.attempt,
                    lease=pb.Lease(ask=message.lease.ask, seconds=message.lease.seconds),
                    first_page=message.first_page,
                    pages=message.pages,
                )
            )
        case Ready():
            sums = message.checksums
            return pb.ToDecode(
                ready=pb.Ready(
                    transfer_id=message.transfer_id,
                    attempt=message.attempt,
                    lease=pb.Lease(ask=message.lease.ask, seconds=message.lease.seconds),
                    first_page=message.first_page,
                    pages=message.pages,
                    slot=message.slot,
                    payload=message.payload,
                    prompt_hash=message.prompt_hash,
                    page_checksums=[pb.Checksum(position=position, xxh3=value) for position, value in sums.pages],
                    slot_checksum=sums.slot or 0,
                    slot_checked=sums.slot is not None,
                )
            )
        case Refuse(transfer_id=transfer_id, attempt=attempt, reason=reason, retryable=retryable):
            refuse = pb.Refuse(transfer_id=transfer_id, attempt=attempt, reason=reason, retryable=retryable)
            return pb.ToDecode(refuse=refuse)
        case Hello():
            return pb.ToDecode(hello=_encode_hello(message))


def decode_to_prefill(message: pb.ToPrefill) -> ToPrefill:
    """Raises WireError on anything that is not a legal message."""
    kind = message.WhichOneof("message")
    match kind:
        case "hello":
            return _decode_hello(message.hello)
        case "claim":
            claim = message.claim
            if claim.num_tokens == 0:
                raise WireError(f"claim of {claim.transfer_id!r} for no tokens")
            return Claim(
                transfer_id=check_id(claim.transfer_id),
                attempt=claim.attempt,
                ask=claim.ask,
                source_epoch=claim.source_epoch,
                num_tokens=claim.num_tokens,
                prompt_hash=claim.prompt_hash,
            )
        case "renew":
            renew = message.renew
            return Renew(transfer_id=check_id(renew.transfer_id), attempt=renew.attempt, ask=renew.ask)
        case "fetched":
            fetched = message.fetched
            return Fetched(transfer_id=check_id(fetched.transfer_id), attempt=fetched.attempt)
        case "release":
            release = message.release
            return Release(transfer_id=check_id(release.transfer_id), attempt=release.attempt, reason=release.reason)
    raise WireError("empty message to prefill, or of a kind this version does not know")


def decode_to_decode(message: pb.ToDecode) -> ToDecode:
    """Raises WireError on anything that is not a legal message."""
    kind = message.WhichOneof("message")
    match kind:
        case "hello":
            return _decode_hello(message.hello)
        case "progress":
            progress = message.progress
            return Progress(
                transfer_id=check_id(progress.transfer_id),
                attempt=progress.attempt,
                lease=_decode_lease(progress.lease),
                first_page=progress.first_page,
                pages=tuple(progress.pages),
            )
        case "ready":
            ready = message.ready
            return Ready(
                transfer_id=check_id(ready.transfer_id),
                attempt=ready.attempt,
                lease=_decode_lease(ready.lease),
                first_page=ready.first_page,
                pages=tuple(ready.pages),
                slot=ready.slot,
                payload=ready.payload,
                prompt_hash=ready.prompt_hash,
                checksums=Checksums(
                    slot=ready.slot_checksum if ready.slot_checked else None,
                    pages=tuple((checksum.position, checksum.xxh3) for checksum in ready.page_checksums),
                ),
            )
        case "refuse":
            refuse = message.refuse
            return Refuse(
                transfer_id=check_id(refuse.transfer_id),
                attempt=refuse.attempt,
                reason=refuse.reason,
                retryable=refuse.retryable,
            )
    raise WireError("empty message to decode, or of a kind this version does not know")


def _encode_hello(hello: Hello) -> pb.Hello:
    return pb.Hello(
        epoch=hello.epoch,
        session_id=hello.session_id,
        transport=hello.transport,
        engine_version=hello.engine_version,
        format_digest=hello.format_digest,
        format_summary=hello.format_summary,
        pages=_encode_region(hello.pages),
        slots=_encode_region(hello.slots),
        lease_seconds=hello.lease_s,
        lane_port=hello.lane_port,
        lane_key=hello.lane_key,
    )


def _decode_hello(hello: pb.Hello) -> Hello:
    host, _, port = hello.session_id.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise WireError(f"session id {hello.session_id!r} is not host:port")
    if not hello.epoch:
        raise WireError("Hello without an epoch")
    if hello.lane_port > 65535:
        raise WireError(f"{hello.lane_port} is not a port")
    return Hello(
        epoch=hello.epoch,
        session_id=hello.session_id,
        transport=hello.transport,
        engine_version=hello.engine_version,
        format_digest=hello.format_digest,
        format_summary=hello.format_summary,
        pages=_decode_region(hello.pages),
        slots=_decode_region(hello.slots),
        lease_s=_decode_seconds(hello.lease_seconds),
        lane_port=hello.lane_port,
        lane_key=hello.lane_key,
    )


def _encode_region(region: MemoryRegion) -> pb.Region:
    return pb.Region(base_address=region.base_address, stride_bytes=region.stride_bytes, count=region.count)


def _decode_region(region: pb.Region) -> MemoryRegion:
    try:
        return MemoryRegion(region.base_address, region.stride_bytes, region.count)
    except ValueError as error:
        raise WireError(str(error)) from None


def _decode_lease(lease: pb.Lease) -> Lease:
    return Lease(lease.ask, _decode_seconds(lease.seconds))


def _decode_seconds(seconds: float) -> float:
    if not 0 < seconds < 86400:
        raise WireError(f"a lease of {seconds} seconds")
    return seconds
