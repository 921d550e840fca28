"""Reads server-sent events the way a client does, byte by byte from the socket."""

import json
from typing import Any

from aiohttp import ClientResponse


def parse_events(raw: bytes) -> list[tuple[str | None, str]]:
    """(event name, data) of every frame; comments are left out."""
    frames = []
    for block in raw.decode().split("\n\n"):
        name, data = None, []
        for line in block.split("\n"):
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data.append(line.removeprefix("data: "))
        if data:
            frames.append((name, "\n".join(data)))
    return frames


async def chunks_of(response: ClientResponse) -> list[dict[str, Any]]:
    """The JSON chunks of a chat or completion stream, which must end with [DONE]."""
    assert response.status == 200, await response.text()
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    frames = [data for _, data in parse_events(await response.read())]
    assert frames[-1] == "[DONE]"
    return [json.loads(data) for data in frames[:-1]]
