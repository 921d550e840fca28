"""One client request: parsed once, and edited for its legs by splicing a few bytes onto the end of its body."""

import itertools
from collections.abc import Mapping
from typing import Any

import orjson

from api.body import check_media_type, syntax_error
from router.resume import Progress, may_resume
from runtime.errors import RequestError

_numbers = itertools.count(1)

_ROUTERS_OWN = ("kv_transfer_params", "previous_items", "referenced_items")
"""Members that only a router sets: a client must not name a transfer, and what it says belongs into `input`."""
_SESSION_HEADERS = ("x-session-id", "x-user-id", "x-tenant-id")
_SESSION_FIELDS = ("session_id", "prompt_cache_key", "user", "user_id")


class Request:
    """A request to generate, as it came from a client.

    `fields` is the parsed body; `raw` are its bytes. Editing appends members before the closing brace: in a JSON object
    the last of several members of one name counts, for orjson and msgspec alike, so a long prompt is never rewritten.
    """

    __slots__ = (
        "choices",
        "fields",
        "headers",
        "num_tokens",
        "number",
        "path",
        "progress",
        "raw",
        "request_id",
        "resumable",
        "stream",
    )

    def __init__(self, path: str, headers: Mapping[str, str], raw: bytes, request_id: str, *, max_choices: int) -> None:
        """`headers` has lower-case names. Raises RequestError when the body is not a JSON object, or says so."""
        self.number = next(_numbers)
        """Unique in this process, unlike `request_id`."""
        self.path = path
        self.headers = headers
        self.request_id = request_id
        check_media_type(headers.get("content-type"))
        try:
            fields = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise syntax_error(raw, error) from None
        if not isinstance(fields, dict):
            raise RequestError("The request body is not a JSON object.")
        if any(name in fields for name in _ROUTERS_OWN):
            fields = {name: value for name, value in fields.items() if name not in _ROUTERS_OWN}
            raw = orjson.dumps(fields)
        self.fields: dict[str, Any] = fields
        self.raw = raw
        self.stream = fields.get("stream") is True
        self.choices = _count_choices(fields, max_choices)
        self.num_tokens = _count_tokens(fields, len(raw))
        """Prompt tokens: exact for token ids, otherwise estimated from the size of the body."""
        self.resumable = may_resume(self)
        self.progress: Progress | None = None
        """Of a stream that broke: what the client has. The next legs go on from there."""

    def with_members(self, members: Mapping[str, Any]) -> list[bytes | memoryview]:
        """The body with `members` set, in pieces."""
        if not members:
            return [self.raw]
        end = self.raw.rindex(b"}")
        tail = orjson.dumps(members)
        comma = b"," if self.fields else b""
        return [memoryview(self.raw)[:end], comma + tail[1:]]

    def add_member(self, name: str, value: bytes) -> None:
        """Set a member of the body to a JSON text, which is not parsed."""
        comma = b"," if self.fields else b""
        self.raw = b'%b%b"%b":%b}' % (self.raw[: self.raw.rindex(b"}")], comma, name.encode(), value)
        self.num_tokens += len(value) // 4

    @property
    def session(self) -> str | None:
        """What says that this request belongs with others, from headers or body."""
        for header in _SESSION_HEADERS:
            if value := self.headers.get(header):
                return value
        nested = self.fields.get("session_params")
        if isinstance(nested, dict) and isinstance(value := nested.get("session_id"), str) and value:
            return value
        for field in _SESSION_FIELDS:
            if isinstance(value := self.fields.get(field), str) and value:
                return value
        return None


def _count_choices(fields: dict[str, Any], max_choices: int) -> int:
    """n times the number of prompts: how many transfers the nodes will make of this request."""
    n = fields.get("n")
    choices = n if isinstance(n, int) and n > 0 else 1
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        choices *= len(prompt)
    if choices > max_choices:
        raise RequestError(f"n: {choices} choices over all prompts, at most {max_choices} are served", param="n")
    return choices


def _count_tokens(fields: dict[str, Any], num_bytes: int) -> int:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return len(prompt)
        if isinstance(prompt[0], list):
            return sum(len(part) for part in prompt if isinstance(part, list))
    return max(1, num_bytes // 4)
