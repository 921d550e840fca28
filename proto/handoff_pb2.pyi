from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("epoch", "session_id", "transport", "engine_version", "format_digest", "format_summary", "pages", "slots", "lease_seconds", "lane_port", "lane_key")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FORMAT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FORMAT_SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LANE_PORT_FIELD_NUMBER: _ClassVar[int]
    LANE_KEY_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    session_id: str
    transport: str
    engine_version: str
    format_digest: str
    format_summary: str
    pages: Region
    slots: Region
    lease_seconds: float
    lane_port: int
    lane_key: bytes
    def __init__(self, epoch: _Optional[str] = ..., session_id: _Optional[str] = ..., transport: _Optional[str] = ..., engine_version: _Optional[str] = ..., format_digest: _Optional[str] = ..., format_summary: _Optional[str] = ..., pages: _Optional[_Union[Region, _Mapping]] = ..., slots: _Optional[_Union[Region, _Mapping]] = ..., lease_seconds: _Optional[float] = ..., lane_port: _Optional[int] = ..., lane_key: _Optional[bytes] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("base_address", "stride_bytes", "count")
    BASE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STRIDE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    base_address: int
    stride_bytes: int
    count: int
    def __init__(self, base_address: _Optional[int] = ..., stride_bytes: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class ToPrefill(_message.Message):
    __slots__ = ("hello", "claim", "renew", "fetched", "release")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    claim: Claim
    renew: Renew
    fetched: Fetched
    release: Release
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., claim: _Optional[_Union[Claim, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class ToDecode(_message.Message):
    __slots__ = ("hello", "progress", "ready", "refuse")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    progress: Progress
    ready: Ready
    refuse: Refuse
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("transfer_id", "attempt", "ask", "source_epoch", "num_tokens", "prompt_hash")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HASH_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    attempt: int
    ask: int
    source_epoch: str
    num_tokens: int
    prompt_hash: bytes
    def __init__(self, transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., ask: _Optional[int] = ..., source_epoch: _Optional[str] = ..., num_tokens: _Optional[int] = ..., prompt_hash: _Optional[bytes] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("transfer_id", "attempt", "ask")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    attempt: int
    ask: int
    def __init__(self, transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., ask: _Optional[int] = ...) -> None: ...

class Fetched(_message.Message):
    __slots__ = ("transfer_id", "attempt")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    attempt: int
    def __init__(self, transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("transfer_id", "attempt", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    attempt: int
    reason: str
    def __init__(self, transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("ask", "seconds")
    ASK_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ask: int
    seconds: float
    def __init__(self, ask: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("transfer_id", "attempt", "lease", "first_page", "pages")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    attempt: int
    lease: Lease
    first_page: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., first_page: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("transfer_id", "attempt", "lease", "first_page", "pages", "slot", "payload", "prompt_hash", "page_checksums", "slot_checksum", "slot_checked")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HASH_FIELD_NUMBER: _ClassVar[int]
    PAGE_CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    SLOT_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    SLOT_CHECKED_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    attempt: int
    lease: Lease
    first_page: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    slot: int
    payload: bytes
    prompt_hash: bytes
    page_checksums: _containers.RepeatedCompositeFieldContainer[Checksum]
    slot_checksum: int
    slot_checked: bool
    def __init__(self, transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., first_page: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ..., slot: _Optional[int] = ..., payload: _Optional[bytes] = ..., prompt_hash: _Optional[bytes] = ..., page_checksums: _Optional[_Iterable[_Union[Checksum, _Mapping]]] = ..., slot_checksum: _Optional[int] = ..., slot_checked: _Optional[bool] = ...) -> None: ...

class Checksum(_message.Message):
    __slots__ = ("position", "xxh3")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    position: int
    xxh3: int
    def __init__(self, position: _Optional[int] = ..., xxh3: _Optional[int] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("transfer_id", "attempt", "reason", "retryable")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    attempt: int
    reason: str
    retryable: bool
    def __init__(self, transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...
