"""`kv_transfer_params` of a request: which leg of a disaggregated request this is, and what the engine is told.

A router splits one request in two. The prefill leg computes the prompt and holds its state, the decode leg fetches
that state and generates. Without these parameters a request is computed here from end to end.
"""

import re
from typing import Literal, TypeVar

import msgspec

from api.backend import EngineInfo
from api.sampling import check_token_ids
from api.schema import ChatBody, KvTransferParams, SamplingBody
from runtime.errors import RequestError
from runtime.requests import LookUpState, ReceiveState, SendState

Body = TypeVar("Body", bound=SamplingBody)

_TRANSFER_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_ADDRESS = re.compile(r"[^\s/]{1,255}:\d{1,5}")
_BOOTSTRAP = re.compile(r"http://[^\s/]{1,255}:\d{1,5}/?")
_EPOCH = re.compile(r"(?:[0-9a-fA-F]{32})?")


class Leg(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a request this node computes."""

    kind: Literal["local", "prefill", "decode"] = "local"
    transfer_id: str = ""
    source_address: str = ""
    source_epoch: str = ""
    bootstrap_address: str = ""
    """Set instead of `source_address` by routers that speak vLLM's protocol, with the name of one engine there."""
    engine_id: str = ""
    generated_ids: tuple[int, ...] = ()
    """A resumed stream: what was generated before it broke on another node."""
    created: int | None = None
    """The time that the stream's chunks carry, if it is resumed."""

    def handoff(self, choice: int, num_choices: int) -> SendState | ReceiveState | LookUpState | None:
        """What the engine is told about choice `choice`: with several, each is a transfer of its own."""
        if self.kind == "local":
            return None
        transfer_id = self.transfer_id if num_choices == 1 else f"{self.transfer_id}-{choice}"
        if self.kind == "prefill":
            return SendState(transfer_id=transfer_id)
        if self.bootstrap_address:
            return LookUpState(
                transfer_id=transfer_id, bootstrap_address=self.bootstrap_address, engine_id=self.engine_id
            )
        return ReceiveState(transfer_id=transfer_id, source_address=self.source_address, source_epoch=self.source_epoch)


def leg_of(params: KvTransferParams | None, info: EngineInfo) -> Leg:
    """Read and check the parameters against the role of this node. Raises RequestError naming the missing key."""
    leg = _leg_of(params, info)
    if params is None or params.resume is None:
        return leg
    resume = params.resume
    check_token_ids(resume.token_ids, "kv_transfer_params", info.vocab_size)
    return msgspec.structs.replace(leg, generated_ids=tuple(resume.token_ids), created=resume.created)


def _leg_of(params: KvTransferParams | None, info: EngineInfo) -> Leg:
    sends = params is not None and bool(params.do_remote_decode)
    receives = params is not None and bool(params.do_remote_prefill)
    if sends and receives:
        raise _wrong("do_remote_decode and do_remote_prefill exclude each other")
    if info.role == "prefill" and not sends:
        raise RequestError(
            "kv_transfer_params: this node only prefills; send requests to the router, or to a decode node",
            param="kv_transfer_params",
            code="prefill_only",
        )
    if info.role != "prefill" and sends:
        raise RequestError(
            f"kv_transfer_params: this node ({info.role}) does not prefill for others",
            param="kv_transfer_params",
            code="not_a_prefill_node",
        )
    if info.role == "standalone" and receives:
        raise RequestError(
            "kv_transfer_params: this node (standalone) does not receive state from others",
            param="kv_transfer_params",
            code="not_a_decode_node",
        )
    if params is None or not (sends or receives):
        return Leg()
    if params.transfer_id is None:
        raise _wrong("transfer_id is missing", "transfer_id")
    if not _TRANSFER_ID.fullmatch(params.transfer_id):
        raise _wrong("transfer_id must be 1 to 128 of the characters A-Z a-z 0-9 _ . : -", "transfer_id")
    if sends:
        return Leg(kind="prefill", transfer_id=params.transfer_id)
    if params.remote_address is None and params.remote_bootstrap_addr is not None:
        if not _BOOTSTRAP.fullmatch(params.remote_bootstrap_addr):
            raise _wrong("remote_bootstrap_addr must be http://host:port", "remote_bootstrap_addr")
        if not params.remote_engine_id:
            raise _wrong("remote_engine_id is missing", "remote_engine_id")
        return Leg(
            kind="decode",
            transfer_id=params.transfer_id,
            bootstrap_address=params.remote_bootstrap_addr,
            engine_id=params.remote_engine_id,
        )
    if params.remote_address is None:
        raise _wrong("remote_address is missing", "remote_address")
    if not _ADDRESS.fullmatch(params.remote_address):
        raise _wrong("remote_address must be host:port", "remote_address")
    if not _EPOCH.fullmatch(params.remote_epoch or ""):
        raise _wrong("remote_epoch must be 32 hexadecimal digits", "remote_epoch")
    return Leg(
        kind="decode",
        transfer_id=params.transfer_id,
        source_address=params.remote_address,
        source_epoch=params.remote_epoch or "",
    )


def first_token_body(body: Body) -> Body:
    """The prefill leg's body: not streamed, one token, and `min_tokens` as the caller meant it.

    Routers write `max_tokens: 1, min_tokens: 1` here; that pair says nothing about the first token.
    """
    params = body.kv_transfer_params
    max_tokens = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
    if params is not None and params.min_tokens is not None:
        min_tokens = params.min_tokens
    elif body.min_tokens == max_tokens == 1:
        min_tokens = 0
    else:
        min_tokens = body.min_tokens or 0
    # One token more is all there will be, however many the caller wants at least.
    max_tokens = 1 if params is None or params.resume is None else len(params.resume.token_ids) + 1
    min_tokens = max(0, min(max_tokens, min_tokens))
    changes = {"max_completion_tokens": None} if isinstance(body, ChatBody) else {}
    return msgspec.structs.replace(
        body, stream=False, stream_options=None, max_tokens=max_tokens, min_tokens=min_tokens, **changes
    )


def _wrong(message: str, key: str | None = None) -> RequestError:
    param = "kv_transfer_params" if key is None else f"kv_transfer_params.{key}"
    return RequestError(f"{param}: {message}", param=param)
