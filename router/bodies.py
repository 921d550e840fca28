"""The bodies of both legs, in the words of the nodes: Tandem's own, or vLLM's with its Mooncake connector.

Tandem nodes need one more member and know the rest themselves. vLLM's prefill leg is an ordinary request for one token
that must not end early (`min_tokens: 1`), or its state is not handed over.
"""

from typing import Any

import orjson

from router.nodes import Dialect
from router.request import Request
from router.transfers import Transfer

Body = list[bytes | memoryview]


def prefill_body(request: Request, transfer: Transfer, dialect: Dialect) -> Body:
    params: dict[str, Any] = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": transfer.transfer_id,
    }
    if dialect == "vllm":
        return [orjson.dumps(_one_token(request.fields, request.path) | {"kv_transfer_params": params})]
    if isinstance(min_tokens := request.fields.get("min_tokens"), int):
        params["min_tokens"] = min_tokens
    if request.progress is not None:
        params["resume"] = request.progress
    return request.with_members({"kv_transfer_params": params})


def decode_body(request: Request, transfer: Transfer | None, dialect: Dialect) -> Body:
    resume: dict[str, Any] = {} if request.progress is None else {"resume": request.progress}
    if transfer is None:
        return request.with_members({"kv_transfer_params": resume} if resume else {})
    params = {"do_remote_decode": False, "do_remote_prefill": True, "transfer_id": transfer.transfer_id} | resume
    if dialect == "vllm":
        params |= {"remote_bootstrap_addr": transfer.source_address, "remote_engine_id": transfer.source_epoch}
    else:
        params |= {"remote_address": transfer.source_address, "remote_epoch": transfer.source_epoch}
    return request.with_members({"kv_transfer_params": params})


def _one_token(fields: dict[str, Any], path: str) -> dict[str, Any]:
    """The client's body as a request for exactly one token, not streamed."""
    body = {name: value for name, value in fields.items() if name != "stream_options"} | {"stream": False}
    if path.startswith("/inference/v1/generate"):
        sampling = body.get("sampling_params")
        body["sampling_params"] = (sampling if isinstance(sampling, dict) else {}) | {"max_tokens": 1, "min_tokens": 1}
        return body
    if path.startswith("/v1/responses"):
        return body | {"max_output_tokens": 1}
    body |= {"max_tokens": 1, "min_tokens": 1}
    if "max_completion_tokens" in body:
        body["max_completion_tokens"] = 1
    return body
