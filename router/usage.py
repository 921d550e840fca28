"""Usage across the seam, for nodes that do not hand it over: the prompt was counted where it was prefilled.

To a vLLM decode node the whole prompt looks cached, so everything about the prompt comes from prefill's reply. Both
replies are of one API, so the fields have the same names in both.
"""

from collections.abc import Iterator
from typing import Any, Final

import orjson

_MARK: Final = b'"usage":'
_PROMPT_COUNTS: Final = ("prompt_tokens", "input_tokens")
_PROMPT_FIELDS: Final = (
    *_PROMPT_COUNTS,
    "prompt_tokens_details",
    "input_tokens_details",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
)
_ANSWER_COUNTS: Final = ("completion_tokens", "output_tokens")
_INSIDE: Final = ("response", "message")
"""Members that hold a whole answer, in events of the Responses and the Messages API."""


def usage_of(body: bytes) -> dict[str, Any] | None:
    """The usage in a prefill leg's reply."""
    try:
        usage = orjson.loads(body).get("usage")
    except (orjson.JSONDecodeError, AttributeError):
        return None
    return usage if isinstance(usage, dict) and _first(usage, _PROMPT_COUNTS) is not None else None


def corrected(answer: bytes, prefill: dict[str, Any]) -> bytes:
    """A whole JSON answer, or the data of an event, with prefill's counts in its usage; else what was given."""
    if _MARK not in answer:
        return answer
    try:
        fields = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return answer
    usages = list(_usages(fields))
    for usage in usages:
        _correct(usage, prefill)
    return orjson.dumps(fields) if usages else answer


def corrected_events(events: bytes, prefill: dict[str, Any]) -> bytes:
    """Whole events, those with a usage corrected. The others are not even parsed."""
    if _MARK not in events:
        return events
    lines = events.split(b"\n")
    for index, line in enumerate(lines):
        if line.startswith(b"data: {") and _MARK in line:
            lines[index] = b"data: " + corrected(line[6:], prefill)
    return b"\n".join(lines)


def _usages(fields: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(fields, dict):
        return
    for holder in (fields, *(fields.get(name) for name in _INSIDE)):
        if isinstance(holder, dict) and isinstance(usage := holder.get("usage"), dict):
            yield usage


def _correct(usage: dict[str, Any], prefill: dict[str, Any]) -> None:
    for field in _PROMPT_FIELDS:
        value = prefill.get(field)
        if value is not None:
            usage[field] = value
        else:
            usage.pop(field, None)
    prompt, answer = _first(prefill, _PROMPT_COUNTS), _first(usage, _ANSWER_COUNTS)
    if "total_tokens" in usage and prompt is not None and answer is not None:
        usage["total_tokens"] = prompt + answer


def _first(usage: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((usage[name] for name in names if isinstance(usage.get(name), int)), None)
