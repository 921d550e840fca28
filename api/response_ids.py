"""Ids of stored responses. Each begins with a tag of the node that keeps it, so that whoever routes a follow-up can
send it there without remembering anything."""

import hashlib
import re
import uuid

PREFIX = "resp_"
TAG_CHARS = 8
_ID = re.compile(rf"{PREFIX}([0-9a-f]{{{TAG_CHARS}}})[0-9a-f]{{32}}")


def tag_of(node_id: str) -> str:
    """The tag of a node, by the id under which it is registered."""
    return hashlib.sha256(node_id.encode()).hexdigest()[:TAG_CHARS]


def new_response_id(node_id: str) -> str:
    return f"{PREFIX}{tag_of(node_id)}{uuid.uuid4().hex}"


def is_kept_by(response_id: str, node_id: str) -> bool:
    """Whether this node made the response, and alone may have it."""
    found = _ID.fullmatch(response_id)
    return found is not None and found[1] == tag_of(node_id)
