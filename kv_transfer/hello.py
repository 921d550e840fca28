"""Whether two ranks can work together, decided from their Hellos before anything is claimed."""

from kv_transfer.messages import Hello

_MIN_VERSION = (0, 3, 13)
"""Older engines report a read as done before its bytes are in memory."""


def disagreement(mine: Hello, theirs: Hello) -> str | None:
    """None, or one line naming both values of what keeps the two ranks from exchanging state."""
    if mine.transport != theirs.transport:
        return f"transports differ: {mine.transport} here, {theirs.transport} at {theirs.session_id}"
    if mine.format_digest != theirs.format_digest:
        return f"state formats differ: [{mine.format_summary}] here, [{theirs.format_summary}] at {theirs.session_id}"
    for kind, ours, others in (("page", mine.pages, theirs.pages), ("slot", mine.slots, theirs.slots)):
        if ours.stride_bytes != others.stride_bytes:
            return f"{kind} sizes differ: {ours.stride_bytes} bytes here, {others.stride_bytes} at {theirs.session_id}"
    version = _version(theirs.engine_version)
    if version < _MIN_VERSION:
        return f"transfer engine {theirs.engine_version} at {theirs.session_id} is older than 0.3.13"
    return None


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of the last word: "mooncake 0.3.13.post1" -> (0, 3, 13)."""
    words = text.split()
    numbers = words[-1].split(".") if words else []
    leading = []
    for number in numbers:
        if not number.isdigit():
            break
        leading.append(int(number))
    return tuple(leading)
