"""Ids of stored responses. Each begins with a tag of the node that keeps it and the number of the API process in it, so
that whoever routes a follow-up can send it there without remembering anything."""

import hashlib
import re
import uuid

PREFIX = "resp_"
TAG_CHARS = 8
MAX_PROCESSES = 256
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{40})_\d+")
_ID = re.compile(rf"{PREFIX}([0-9a-f]{{{TAG_CHARS}}})([0-9a-f]{{2}})[0-9a-f]{{30}}")


def tag_of(node_id: str) -> str:
    """The tag of a node, by the id under which it is registered."""
    return hashlib.sha256(node_id.encode()).hexdigest()[:TAG_CHARS]


def new_response_id(node_id: str, process: int = 0) -> str:
    return f"{PREFIX}{tag_of(node_id)}{process:02x}{uuid.uuid4().hex[:30]}"


def process_of(response_id: str) -> int | None:
    """The API process, within its node, that made the response; None for what is no id of ours."""
    found = _ID.fullmatch(response_id)
    return None if found is None else int(found[2], 16)


def response_of_item(item_id: str) -> str | None:
    """The response that an output item belongs to; None for what is no id of ours."""
    found = _ITEM_ID.fullmatch(item_id)
    return None if found is None else PREFIX + found[1]


def is_kept_by(response_id: str, node_id: str) -> bool:
    """Whether this node made the response, and alone may have it."""
    found = _ID.fullmatch(response_id)
    return found is not None and found[1] == tag_of(node_id)
