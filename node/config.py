"""What a prefill and a decode node have in common in their YAML. Names follow vLLM's flags where one exists."""

from pathlib import Path

import msgspec

from api.response_ids import MAX_PROCESSES
from api.settings import ApiSettings
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from node.expert_parallel import ExpertParallelConfig
from node.membership import MembershipConfig


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node: its HTTP address, its engine ranks, and the parts they are made of."""

    host: str = "127.0.0.1"
    port: int = 8000
    advertise_host: str = ""
    """How routers reach this node's HTTP port; empty: `host`."""
    node_id: str = ""
    """Stable over restarts; empty: advertise_host:port."""

    bootstrap_port: int | None = None
    """Prefill nodes behind a router that speaks vLLM's Mooncake protocol: where it asks for `/query` (8998 there)."""

    api_processes: int = 1
    """Processes that serve HTTP on the one port. Each needs a core for the tokens it streams."""
    data_parallel_size: int = 1
    """Engine processes, one per GPU."""
    enable_expert_parallel: bool = False
    """Split the routed experts over the ranks instead of holding all of them on each."""
    expert_parallel: ExpertParallelConfig = ExpertParallelConfig()

    peer_timeout_s: float = 120.0
    """Ranks that share experts: how long one waits for the others to come, and later for their part of a step."""

    engine: EngineConfig
    transfer: TransferConfig = TransferConfig()
    api: ApiSettings = ApiSettings()
    membership: MembershipConfig = MembershipConfig()

    ready_timeout_s: float = 600.0
    """For every rank to load its weights and be able to take work."""
    drain_timeout_s: float = 30.0
    """After SIGTERM: for running streams to end and promised state to be fetched."""
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port={self.port} is not a port")
        if not 1 <= self.api_processes <= MAX_PROCESSES:
            raise ValueError(f"api_processes={self.api_processes}: must be 1 to {MAX_PROCESSES}")
        if self.data_parallel_size < 1:
            raise ValueError(f"data_parallel_size={self.data_parallel_size}: must be at least 1")
        group = self.expert_parallel
        if group != ExpertParallelConfig() and not self.enable_expert_parallel:
            raise ValueError("expert_parallel: needs enable_expert_parallel")
        if self.enable_expert_parallel and group.first_rank + self.data_parallel_size > self.expert_ranks:
            raise ValueError(
                f"expert_parallel: ranks {group.first_rank}..{group.first_rank + self.data_parallel_size - 1} of this "
                f"node do not fit into ranks={self.expert_ranks}"
            )
        devices = self.transfer.devices_by_rank
        if devices and len(devices) != self.data_parallel_size:
            raise ValueError(
                f"transfer.devices_by_rank: {len(devices)} entries for data_parallel_size={self.data_parallel_size}"
            )
        if self.host == "0.0.0.0" and not self.advertise_host:
            raise ValueError("host=0.0.0.0 needs advertise_host: the address at which routers reach this node")

    @property
    def expert_ranks(self) -> int:
        """Ranks over which the routed experts are split."""
        if not self.enable_expert_parallel:
            return 1
        return self.expert_parallel.ranks or self.data_parallel_size

    @property
    def shares_experts(self) -> bool:
        """The ranks need each other in every step."""
        return self.expert_ranks > 1

    @property
    def group_host(self) -> str:
        """At which address the other ranks of the group reach this node's."""
        if not self.expert_parallel.address:
            return "127.0.0.1"
        return self.expert_parallel.host or self.advertise_host or self.host

    @property
    def http_url(self) -> str:
        return f"http://{self.advertise_host or self.host}:{self.port}"

    @property
    def model_id(self) -> str:
        """The name requests use: the first served name, else the checkpoint directory's."""
        return (*self.api.served_model_name, Path(self.engine.model).resolve().name)[0]

    @property
    def id(self) -> str:
        return self.node_id or f"{self.advertise_host or self.host}:{self.port}"
