"""Every file under configs/ is one that its process would start with, on the machines it is written for."""

from pathlib import Path

import msgspec
import pytest

from decode_node.config import DecodeNodeConfig
from node.config import NodeConfig
from prefill_node.config import PrefillNodeConfig
from router.config import RouterConfig
from runtime import config as configuration
from tools.check_configs import CONFIGS, check_folder
from tools.config_rules import nodes_of
from tools.topology import kind_of_file, load_processes, load_topology

FOLDERS = sorted(path for path in CONFIGS.iterdir() if path.is_dir())
FILES = sorted(CONFIGS.rglob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_the_documented_shapes_are_there() -> None:
    assert {folder.name for folder in FOLDERS} >= {"local", "h200", "gb200"}
    assert not list(CONFIGS.rglob("*.yml"))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_file_follows_its_process_and_survives_its_own_dump(path: Path) -> None:
    kind = kind_of_file(path)
    config = configuration.load(path, kind)
    assert configuration.convert(msgspec.yaml.decode(configuration.dump(config)), kind, where="dump") == config


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_each_deployment_fits_the_machines_it_describes(folder: Path) -> None:
    report, problems = check_folder(folder)
    assert problems == []
    assert report


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.name != "local"], ids=name)
def test_gpu_files_carry_the_values_of_the_documented_deployment(folder: Path) -> None:
    prefill = configuration.load(folder / "prefill.yaml", PrefillNodeConfig)
    decode = configuration.load(folder / "decode.yaml", DecodeNodeConfig)
    router = configuration.load(folder / "router.yaml", RouterConfig)
    assert (prefill.port, decode.port, router.server.port) == (8000, 8001, 30000)
    nodes: list[NodeConfig] = [prefill, decode]
    for node in nodes:
        assert node.data_parallel_size == 4
        assert node.enable_expert_parallel
        assert (node.engine.kv_cache_dtype, node.engine.block_size, node.engine.max_model_len) == ("fp8", 256, "auto")
        assert node.model_id == router.model == "deepseek-ai/DeepSeek-V4-Flash"
    batch = {"h200": (16384, 512), "gb200": (65536, 1536)}[folder.name]
    assert (prefill.engine.max_num_batched_tokens, decode.engine.max_num_batched_tokens) == batch
    assert (prefill.engine.max_num_seqs, decode.engine.max_num_seqs) == (8, batch[1])


def test_one_gb200_file_serves_every_tray_of_its_role() -> None:
    folder = CONFIGS / "gb200"
    topology = load_topology(folder)
    assert topology is not None
    several = topology.deployments[-1]
    modules = [place.module for place in several.processes]
    assert (modules.count("prefill_node"), modules.count("decode_node")) == (2, 4)
    assert {place.config for place in several.processes} == {"router.yaml", "prefill.yaml", "decode.yaml"}
    urls = [node.http_url for _, node in nodes_of(load_processes(topology, several, folder))]
    assert len(set(urls)) == 6
