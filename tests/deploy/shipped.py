"""What the tests of deploy/ compare with: the YAML files of configs/, read as their processes read them."""

from collections.abc import Sequence
from pathlib import Path

from node.config import NodeConfig
from router.config import RouterConfig
from runtime import config as configuration
from tools.topology import KIND_OF, Placement, load_topology

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DEPLOY = ROOT / "deploy"

RANK_STOP_S = 5.0
"""What a node allows its ranks for their own end, beyond `transfer.stop_grace_s`."""


def load(path: Path, module: str, overrides: Sequence[str] = ()) -> NodeConfig | RouterConfig:
    config = configuration.load(path, KIND_OF[module], overrides)
    assert isinstance(config, NodeConfig | RouterConfig)
    return config


def http_port(config: NodeConfig | RouterConfig) -> int:
    return config.port if isinstance(config, NodeConfig) else config.server.port


def stop_s(config: NodeConfig | RouterConfig) -> float:
    """The longest an orderly end may take."""
    if isinstance(config, RouterConfig):
        return config.server.drain_s
    return config.drain_timeout_s + config.transfer.stop_grace_s + RANK_STOP_S


def placements(folder: str, deployment: int = 0) -> dict[str, Placement]:
    """By file name."""
    topology = load_topology(CONFIGS / folder)
    assert topology is not None
    return {place.config: place for place in topology.deployments[deployment].processes}


def command_line(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """[module, --config, FILE, --set, K=V, ...] -> (module, file, overrides), refusing every other word."""
    module, option, file, *rest = words
    assert option == "--config"
    assert rest[::2] == ["--set"] * (len(rest) // 2), rest
    assert len(rest) % 2 == 0, rest
    return module, file, list(rest[1::2])
