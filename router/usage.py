"""Usage across the seam, for nodes that do not hand it over: the prompt was counted where it was prefilled.

To a vLLM decode node the whole prompt looks cached, so `prompt_tokens` and `cached_tokens` come from prefill's reply.
"""

from typing import Any

import orjson

_MARK = b'"usage":'


def usage_of(body: bytes) -> dict[str, Any] | None:
    """The usage in a prefill leg's reply."""
    try:
        usage = orjson.loads(body).get("usage")
    except (orjson.JSONDecodeError, AttributeError):
        return None
    return usage if isinstance(usage, dict) and isinstance(usage.get("prompt_tokens"), int) else None


def corrected(answer: bytes, prefill: dict[str, Any]) -> bytes:
    """A whole JSON answer with prefill's counts in its usage; anything else is left as it is."""
    if _MARK not in answer:
        return answer
    try:
        fields = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return answer
    usage = fields.get("usage") if isinstance(fields, dict) else None
    if not isinstance(usage, dict):
        return answer
    usage["prompt_tokens"] = prefill["prompt_tokens"]
    if isinstance(completion := usage.get("completion_tokens"), int):
        usage["total_tokens"] = prefill["prompt_tokens"] + completion
    details = prefill.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    if cached is None:
        usage.pop("prompt_tokens_details", None)
    else:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return orjson.dumps(fields)


def corrected_events(events: bytes, prefill: dict[str, Any]) -> bytes:
    """Whole events, those with a usage corrected. The others are not even parsed."""
    if _MARK not in events:
        return events
    lines = events.split(b"\n")
    for index, line in enumerate(lines):
        if line.startswith(b"data: {") and _MARK in line:
            lines[index] = b"data: " + corrected(line[6:], prefill)
    return b"\n".join(lines)
