"""The YAML of a prefill node."""

from node.config import NodeConfig


class PrefillNodeConfig(NodeConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node that computes prompts and holds their state until a decode node has fetched it."""

    port: int = 8000
