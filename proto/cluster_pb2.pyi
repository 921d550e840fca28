from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    PREFILL: _ClassVar[Role]
    DECODE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
PREFILL: Role
DECODE: Role

class Rank(_message.Message):
    __slots__ = ("rank", "epoch", "handoff_address")
    RANK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    epoch: str
    handoff_address: str
    def __init__(self, rank: _Optional[int] = ..., epoch: _Optional[str] = ..., handoff_address: _Optional[str] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("node_id", "role", "http_url", "model_id", "format_digest", "format_summary", "max_model_len", "ranks", "bootstrap_port", "local_prefill", "version")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    HTTP_URL_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FORMAT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FORMAT_SUMMARY_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_PORT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    role: Role
    http_url: str
    model_id: str
    format_digest: str
    format_summary: str
    max_model_len: int
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    bootstrap_port: int
    local_prefill: bool
    version: str
    def __init__(self, node_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., http_url: _Optional[str] = ..., model_id: _Optional[str] = ..., format_digest: _Optional[str] = ..., format_summary: _Optional[str] = ..., max_model_len: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ..., bootstrap_port: _Optional[int] = ..., local_prefill: _Optional[bool] = ..., version: _Optional[str] = ...) -> None: ...

class RankLoad(_message.Message):
    __slots__ = ("rank", "running", "waiting", "receiving", "held", "queued_prompt_tokens", "pages_total", "pages_free", "slots_total", "slots_free")
    RANK_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RECEIVING_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    running: int
    waiting: int
    receiving: int
    held: int
    queued_prompt_tokens: int
    pages_total: int
    pages_free: int
    slots_total: int
    slots_free: int
    def __init__(self, rank: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., receiving: _Optional[int] = ..., held: _Optional[int] = ..., queued_prompt_tokens: _Optional[int] = ..., pages_total: _Optional[int] = ..., pages_free: _Optional[int] = ..., slots_total: _Optional[int] = ..., slots_free: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence", "loads", "trouble")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    loads: _containers.RepeatedCompositeFieldContainer[RankLoad]
    trouble: str
    def __init__(self, sequence: _Optional[int] = ..., loads: _Optional[_Iterable[_Union[RankLoad, _Mapping]]] = ..., trouble: _Optional[str] = ...) -> None: ...

class EpochChanged(_message.Message):
    __slots__ = ("rank",)
    RANK_FIELD_NUMBER: _ClassVar[int]
    rank: Rank
    def __init__(self, rank: _Optional[_Union[Rank, _Mapping]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class NodeMessage(_message.Message):
    __slots__ = ("join", "heartbeat", "epoch_changed", "draining", "leaving")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    join: Join
    heartbeat: Heartbeat
    epoch_changed: EpochChanged
    draining: Draining
    leaving: Leaving
    def __init__(self, join: _Optional[_Union[Join, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., epoch_changed: _Optional[_Union[EpochChanged, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("router_id", "heartbeat_s")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    heartbeat_s: float
    def __init__(self, router_id: _Optional[str] = ..., heartbeat_s: _Optional[float] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class ReleaseTransfers(_message.Message):
    __slots__ = ("transfer_ids",)
    TRANSFER_IDS_FIELD_NUMBER: _ClassVar[int]
    transfer_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, transfer_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("welcome", "refused", "release")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    refused: Refused
    release: ReleaseTransfers
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., release: _Optional[_Union[ReleaseTransfers, _Mapping]] = ...) -> None: ...
