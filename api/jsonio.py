"""JSON that may hold what a caller sent: msgspec writes and reads integers of any size, orjson none beyond 64 bits."""

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`value` as a JSON body. There is no NaN in it: such a number becomes null."""
    return web.Response(
        body=msgspec.json.encode(value),
        status=status,
        content_type="application/json",
        headers=headers,
    )
