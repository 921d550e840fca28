"""A described cluster: hosts with GPUs and NICs, and the processes that run together on them.

`topology.yaml` in a folder of configs/ says for which machines its files are written. A folder without one has a
`cluster.yaml` for `tools.up`; its processes all run on one host without GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from decode_node.config import DecodeNodeConfig
from node.config import NodeConfig
from prefill_node.config import PrefillNodeConfig
from router.config import RouterConfig
from runtime import config as configuration
from runtime.errors import ConfigError
from tools.up import ClusterConfig

Module = Literal["router", "prefill_node", "decode_node"]
ProcessConfig = NodeConfig | RouterConfig

KIND_OF: dict[str, type[NodeConfig] | type[RouterConfig]] = {
    "router": RouterConfig,
    "prefill_node": PrefillNodeConfig,
    "decode_node": DecodeNodeConfig,
}
LOOPBACK = ("127.0.0.1", "localhost")


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine, or one tray."""

    name: str
    """How the others reach it, unless `addresses` says more."""
    addresses: tuple[str, ...] = ()
    """Further names and addresses that lead to it."""
    gpus: int = 0
    gpu_memory_gib: float = 0.0
    """Of each GPU, as its driver reports it."""
    nics: tuple[str, ...] = ()
    """RDMA devices."""

    def is_called(self, address: str) -> bool:
        return address in (self.name, *self.addresses)


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process on one host."""

    module: Module
    config: str
    """Relative to the topology file."""
    host: str
    gpus: tuple[int, ...] = ()
    """What CUDA_VISIBLE_DEVICES holds, in the order of the ranks."""
    set: tuple[str, ...] = ()
    """Overrides, as for `--set`."""


class Deployment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Processes that run at the same time."""

    name: str
    processes: tuple[Placement, ...]


class Topology(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    model: str
    """A preset of model.presets, since the checkpoint itself is not at hand."""
    hosts: tuple[Host, ...]
    deployments: tuple[Deployment, ...]

    def __post_init__(self) -> None:
        for what, things in (("hosts", self.hosts), ("deployments", self.deployments)):
            names = [thing.name for thing in things]
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: names are given twice: {sorted(names)}")
        known = {host.name for host in self.hosts}
        for deployment in self.deployments:
            for place in deployment.processes:
                if place.host not in known:
                    raise ValueError(f"{deployment.name}: {place.config} is on host {place.host!r}, hosts are {known}")


class Process(msgspec.Struct, frozen=True):
    """A placement with its configuration read."""

    place: Placement
    host: Host
    config: ProcessConfig

    @property
    def name(self) -> str:
        return f"{self.place.config} on {self.host.name}"


def load_topology(directory: Path) -> Topology | None:
    """`directory`'s topology.yaml, else its cluster.yaml seen as one, else None. Raises ConfigError."""
    if (path := directory / "topology.yaml").exists():
        return configuration.load(path, Topology)
    if (path := directory / "cluster.yaml").exists():
        cluster = configuration.load(path, ClusterConfig)
        data = {
            "model": "tiny",
            "hosts": [{"name": "localhost", "addresses": LOOPBACK}],
            "deployments": [{
                "name": path.name,
                "processes": [
                    {"module": p.module, "config": p.config, "host": "localhost", "set": p.set}
                    for p in cluster.processes
                ],
            }],
        }  # fmt: skip
        return configuration.convert(data, Topology, where=str(path))
    return None


def load_processes(topology: Topology, deployment: Deployment, directory: Path) -> list[Process]:
    """The deployment's processes with their configurations. Raises ConfigError naming the file."""
    hosts = {host.name: host for host in topology.hosts}
    return [
        Process(
            place, hosts[place.host], configuration.load(directory / place.config, KIND_OF[place.module], place.set)
        )
        for place in deployment.processes
    ]


def kind_of_file(path: Path) -> type[msgspec.Struct]:
    """The structure a file of configs/ follows, by its name. Raises ConfigError for a name that says nothing."""
    kinds: dict[str, type[msgspec.Struct]] = {
        "prefill": PrefillNodeConfig,
        "decode": DecodeNodeConfig,
        "standalone": DecodeNodeConfig,
        "router": RouterConfig,
        "cluster": ClusterConfig,
        "topology": Topology,
    }
    for prefix, kind in kinds.items():
        if path.stem == prefix or path.stem.startswith(f"{prefix}-"):
            return kind
    raise ConfigError(f"{path}: a file here is called {', '.join(kinds)}, with a suffix after a dash if need be")
