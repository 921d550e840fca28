"""The `transfer` section of a node's YAML."""

import os
from typing import Literal

import msgspec

from runtime.grpc import TlsConfig

Transport = Literal["tcp", "rdma", "intra_node"]
Verify = Literal["off", "sample", "full"]

_MIN_PORTS = 50
"""Sockets of a dead process block their ports for about a minute: a narrow range makes restarts fail."""


class RdmaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Knobs of Mooncake's RDMA transport. None leaves Mooncake's own default."""

    ib_port: int | None = None
    gid_index: int | None = None
    """Detected when unset; RoCE v2 is often 3."""
    pkey_index: int | None = None
    mtu: Literal[512, 1024, 2048, 4096] | None = None
    traffic_class: int | None = None
    service_level: int | None = None
    num_qp_per_endpoint: int | None = None
    workers_per_context: int | None = None
    slice_bytes: int | None = None
    max_work_requests: int | None = None
    retry_count: int | None = None
    relaxed_ordering: Literal[0, 1, 2] | None = None
    bind_address: str | None = None
    """Address of the RDMA interface where it differs from `host`."""
    topology_file: str | None = None
    """JSON file: memory location -> [[preferred devices], [other devices]]."""
    peer_affinity: str | None = None
    """Which remote device each local device talks to: "mlx5_0=mlx5_0,mlx5_1;..."."""
    nvidia_peermem: bool = False
    """GPUDirect through the nvidia-peermem module instead of DMA-BUF."""


class TransferConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one rank hands state over and fetches it. Times are seconds."""

    transport: Transport = "tcp"
    host: str = "127.0.0.1"
    """The address peers are told for both the control service and Mooncake."""
    bind_host: str = ""
    """The address the hand-off service listens on; empty means `host`. Mooncake listens on every interface."""
    handoff_port: int = 0
    """Port of the gRPC hand-off service; 0 takes a free one. A node with several ranks adds the rank to it."""
    port_range: tuple[int, int] = (15000, 17000)
    """Where each rank's Mooncake (two ports, on every interface) and lanes (one) listen. Firewall it to the peers."""
    devices: tuple[str, ...] = ()
    """RDMA devices such as mlx5_0; empty means all."""
    devices_by_rank: tuple[tuple[str, ...], ...] = ()
    """In place of `devices`, where the ranks of a node differ: those of its first rank, of its second, and so on."""
    rdma: RdmaConfig = RdmaConfig()

    connect_timeout_s: float = 5.0
    """For a peer's control channel to open and exchange Hello, and for the first contact on the data path."""
    lease_s: float = 10.0
    """How long prefill pins what it announced without hearing from the decode rank that claimed it. At least 1."""
    lease_margin_s: float = 1.0
    """Decode stops trusting a lease this much before its end."""
    claim_wait_s: float = 30.0
    """How long a claim may wait for its prefill request to arrive."""
    hold_unclaimed_s: float = 60.0
    """How long a finished state waits for somebody to claim it."""
    prefill_deadline_s: float = 600.0
    """From a claim to Ready: longer than the longest queue and prompt together."""
    read_deadline_s: float = 10.0
    """A receive whose reads make no progress for this long has failed."""
    peer_backoff_s: float = 1.0
    """A peer that could not be reached is not tried again before this."""
    remember_s: float = 600.0
    """How long the ids of ended or released transfers are remembered."""

    verify: Verify = "off"
    """Checksums: of nothing, of the slot and one page in eight, of everything."""
    window: int = 64
    """Reads in flight per engine."""
    max_read_bytes: int | Literal["auto"] = "auto"
    """Neighbouring pages are read together up to this size; larger records are read in parts. "auto": 1 MiB over TCP,
    where every connection carries one read at a time, 16 MiB over transports that divide a read themselves."""
    lanes_per_peer: int = 8
    """TCP connections per peer."""
    tcp_io_threads: int | Literal["auto"] = "auto"
    """Threads of the transfer engine that serve them. "auto": one for every four cores this process may use, up to 4.
    With more than one, device memory is also moved in larger pieces."""
    max_quarantine_pages: int = 4096
    """Past it the transfer engine is re-created, which ends every read at once."""
    recreate_after_s: float = 30.0
    """A read still unfinished after this makes the transfer engine be re-created."""
    stop_grace_s: float = 5.0
    """How long a stopping agent waits for reads in flight."""
    tls: TlsConfig | None = None
    """Mutual TLS of the hand-off service. Mooncake's own ports have no authentication in any case."""

    def of_rank(self, rank: int) -> "TransferConfig":
        """What one rank of a node runs with."""
        if not self.devices_by_rank:
            return self
        return msgspec.structs.replace(self, devices=self.devices_by_rank[rank], devices_by_rank=())

    @property
    def read_bytes_limit(self) -> int:
        """`max_read_bytes`, resolved."""
        if self.max_read_bytes == "auto":
            return 1 << 20 if self.transport == "tcp" else 16 << 20
        return self.max_read_bytes

    @property
    def num_tcp_io_threads(self) -> int:
        """`tcp_io_threads`, resolved."""
        if self.tcp_io_threads == "auto":
            return min(4, max(1, len(os.sched_getaffinity(0)) // 4))
        return self.tcp_io_threads

    def __post_init__(self) -> None:
        low, high = self.port_range
        if not (0 < low < high <= 65535 and high - low >= _MIN_PORTS):
            raise ValueError(f"port_range={self.port_range}: needs {_MIN_PORTS} ports or more within 1..65535")
        if not 0 <= self.handoff_port <= 65535:
            raise ValueError(f"handoff_port={self.handoff_port} is not a port")
        if not 0 < self.lease_margin_s < self.lease_s / 2:
            raise ValueError(f"lease_margin_s={self.lease_margin_s}: positive and under half of lease_s={self.lease_s}")
        if self.lease_s < 1.0:
            raise ValueError(f"lease_s={self.lease_s}: a lease under a second is lost to any hiccup")
        for name in (
            "connect_timeout_s",
            "claim_wait_s",
            "hold_unclaimed_s",
            "prefill_deadline_s",
            "read_deadline_s",
            "peer_backoff_s",
            "remember_s",
            "recreate_after_s",
            "stop_grace_s",
            "window",
            "max_quarantine_pages",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 1 <= self.window <= 1024:
            raise ValueError(f"window={self.window}: Mooncake's queue per peer holds no more than 1024 reads")
        if self.max_read_bytes != "auto" and self.max_read_bytes < 1 << 16:
            raise ValueError(f"max_read_bytes={self.max_read_bytes}: reads under 64 KiB are slow")
        if not 1 <= self.lanes_per_peer <= 16:
            raise ValueError(f"lanes_per_peer={self.lanes_per_peer} is not in 1..16")
        if self.tcp_io_threads != "auto" and not 1 <= self.tcp_io_threads <= 16:
            raise ValueError(f"tcp_io_threads={self.tcp_io_threads} is not in 1..16")
        named = self.devices or self.devices_by_rank
        if named and self.transport != "rdma":
            raise ValueError(f"devices={list(named)} need transport=rdma, not {self.transport}")
        if self.devices and self.devices_by_rank:
            raise ValueError("devices and devices_by_rank: give one of them")
        if not self.host or self.host == "0.0.0.0" or ":" in self.host:
            raise ValueError(f"host={self.host!r} must be an IPv4 address or name that peers can reach")
