"""The YAML of a decode node."""

from typing import Literal

from node.config import NodeConfig


class DecodeNodeConfig(NodeConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node that receives state and generates."""

    port: int = 8001
    prefill: Literal["remote", "local"] = "remote"
    """local: the node computes prompts too and serves alone, without prefill nodes or a router."""

    @property
    def role(self) -> Literal["decode", "standalone"]:
        return "standalone" if self.prefill == "local" else "decode"
