"""JSON responses."""

from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`value` as a JSON body. orjson writes no NaN: such a number would become null."""
    return web.Response(
        body=orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS),
        status=status,
        content_type="application/json",
        headers=headers,
    )
