"""Each rule of the check, by breaking a deployment that is well in exactly one way."""

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine.memory import plan_pools
from model.presets import flash, pro
from node.config import NodeConfig
from runtime import config as configuration
from runtime.errors import ConfigError
from tools.check_configs import CONFIGS, check_folder
from tools.config_rules import plan_of, problems
from tools.memory_plan import rank_weights, state_layout
from tools.topology import KIND_OF, Process, Topology, load_processes, load_topology
from tools.up import ClusterConfig

MODULES = {"prefill": "prefill_node", "decode": "decode_node", "router": "router"}


def deployment(folder: str, changes: dict[str, list[str]], number: int = 0) -> list[Process]:
    """A shipped deployment with overrides for some of its processes, by role."""
    topology = load_topology(CONFIGS / folder)
    assert topology is not None
    processes = load_processes(topology, topology.deployments[number], CONFIGS / folder)
    for role, overrides in changes.items():
        index = next(i for i, process in enumerate(processes) if process.place.module == MODULES[role])
        place = processes[index].place
        path = CONFIGS / folder / place.config
        config = configuration.load(path, KIND_OF[place.module], [*place.set, *overrides])
        processes[index] = msgspec.structs.replace(processes[index], config=config)
    return processes


@pytest.mark.parametrize(
    ("folder", "changes", "expected"),
    [
        ("h200", {"decode": ["port=8000"]}, "port 8000 is also that of prefill.yaml on h200 (port)"),
        ("h200", {"decode": ["transfer.handoff_port=17103"]}, "port 17103 is also that of prefill.yaml"),
        ("h200", {"prefill": ["bootstrap_port=8001"]}, "port 8001 is also that of"),
        ("h200", {"prefill": ["transfer.handoff_port=65534"]}, "65536 is not a port"),
        ("h200", {"router": ["server.port=15500"]}, "port 15500 lies in the transfer.port_range 15000-15999"),
        ("h200", {"prefill": ["transfer.port_range=[15000, 15100]"]}, "is for 4 ranks, 50 ports each"),
        ("h200", {"prefill": ["data_parallel_size=8"]}, "data_parallel_size=8 ranks on 4 GPUs [0, 1, 2, 3]"),
        ("h200", {"prefill": ["engine.device=cpu"]}, "is given GPUs [0, 1, 2, 3], but engine.device=cpu"),
        ("h200", {"decode": ["membership.routers=['127.0.0.1:30000']"]}, "is no router's cluster address"),
        ("h200", {"decode": ["membership.routers=[]"]}, "no router lists http://127.0.0.1:8001"),
        ("h200", {"router": ["nodes.prefill=[{url: 'http://elsewhere:8000'}]"]}, "is no node of this deployment"),
        ("h200", {"decode": ["advertise_host=h201"]}, "advertise_host=h201 is not a name of host h200"),
        ("h200", {"decode": ["transfer.transport=tcp"]}, "transport differs: rdma in ['prefill.yaml on h200']; tcp in"),
        ("h200", {"prefill": ["transfer.devices=[mlx5_9]"]}, "transfer.devices: mlx5_9 is not one of"),
        (
            "h200",
            {"decode": ["transfer.devices_by_rank=[[mlx5_0], [mlx5_1], [], [mlx5_9]]"]},
            "transfer.devices_by_rank of rank 3: mlx5_9 is not one of",
        ),
        (
            "h200",
            {"decode": ["expert_parallel.address=elsewhere:29500", "expert_parallel.ranks=4"]},
            "has rank 0, but expert_parallel.address=elsewhere:29500 is not on h200",
        ),
        (
            "h200",
            {"decode": ["expert_parallel.address=h200:29500", "expert_parallel.ranks=8"]},
            "group at h200:29500: nobody has rank(s) [4, 5, 6, 7]",
        ),
        (
            "h200",
            {r: ["expert_parallel.address=h200:29500", "expert_parallel.ranks=4"] for r in ("prefill", "decode")},
            "rank 0 of the group at h200:29500 is also in prefill.yaml on h200",
        ),
        ("h200", {"decode": ["engine.kv_cache_dtype=bf16"]}, "state formats (rows, index keys, block_size) differ"),
        ("h200", {"decode": ["engine.block_size=512"]}, "state formats (rows, index keys, block_size) differ"),
        ("h200", {"decode": ["engine.index_cache_dtype=fp8"]}, "state formats (rows, index keys, block_size) differ"),
        ("h200", {"decode": ["api.served_model_name=[flash]"]}, "model names differ"),
        ("h200", {"router": ["model=flash"]}, "model names differ"),
        ("h200", {"decode": ["node_id=a"], "prefill": ["node_id=a"]}, "node_id a is that of 2 nodes"),
        ("h200", {"decode": ["prefill=local"]}, "there are only prefill_nodes"),
        ("h200", {"prefill": ["enable_expert_parallel=false"]}, "no memory for any pages: 125.1 GiB less 148.6"),
        ("h200", {"decode": ["engine.num_pages=200000"]}, "no memory for 200000 pages"),
        ("h200", {"decode": ["engine.kv_cache_memory_bytes=3000000000", "engine.max_model_len=1000000"]}, "pages for"),
        ("h200", {"decode": ["engine.max_model_len=2000000"]}, "exceeds the model's 1048576"),
        ("h200", {"router": ["deadlines.state_hold_s=90"]}, "gives up after transfer.hold_unclaimed_s=60"),
        ("h200", {"router": ["deadlines.first_byte_s=60"]}, "ends before deadlines.prefill_s=600"),
        ("gb200", {"decode": ["transfer.host=127.0.0.1"]}, "transfer.host=127.0.0.1 is not a name of host decode-0"),
        ("gb200", {"decode": ["host=127.0.0.1"]}, "host=127.0.0.1 cannot be reached from the other hosts"),
        ("gb200", {"router": ["cluster.host=127.0.0.1"]}, "cluster.host=127.0.0.1 cannot be reached"),
        ("gb200", {r: ["transfer.transport=intra_node"] for r in ("prefill", "decode")}, "intra_node across hosts"),
        ("local", {"prefill": ["transfer.transport=rdma"]}, "but host localhost has no NICs"),
        ("local", {"prefill": ["engine.device=cuda"]}, "but the host has no GPUs"),
    ],
)  # fmt: skip
def test_a_broken_deployment_is_named(folder: str, changes: dict[str, list[str]], expected: str) -> None:
    model = flash()
    assert problems(deployment(folder, {}), model) == []
    found = problems(deployment(folder, changes), model)
    assert any(expected in problem for problem in found), found


def test_a_gpu_is_given_once_and_must_exist() -> None:
    processes = deployment("h200", {})
    place = msgspec.structs.replace(processes[2].place, gpus=(3, 4, 5, 8))
    processes[2] = msgspec.structs.replace(processes[2], place=place)
    found = problems(processes, flash())
    assert any("GPU 3 is also given to prefill.yaml on h200" in problem for problem in found)
    assert any("GPU 8, but host h200 has GPUs 0..7" in problem for problem in found)


def test_weights_are_those_of_the_published_checkpoints() -> None:
    assert rank_weights(flash(), 1) == 159_609_485_896
    assert rank_weights(flash(), 4) == 46_665_267_784
    assert rank_weights(pro(), 1) == 864_704_792_696


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_pools_are_planned_as_the_engine_plans_them(role: str) -> None:
    model = flash()
    process = next(p for p in deployment("h200", {}) if p.place.module == MODULES[role])
    assert isinstance(process.config, NodeConfig)
    memory = plan_of(process, process.config, model)
    sizes = plan_pools(
        process.config.engine,
        model,
        state_layout(model, process.config),
        holds_states=role == "prefill",
        budget_bytes=memory.slots + memory.free,
    )
    assert (sizes.num_slots, sizes.num_pages) == (memory.num_slots, memory.num_pages)
    assert sizes.max_model_len == model.max_position_embeddings


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hosts": [{"name": "a"}, {"name": "a"}], "deployments": []}, "names are given twice"),
        (
            {"hosts": [], "deployments": [{"name": "d", "processes": [
                {"module": "router", "config": "r.yaml", "host": "b"}]}]},
            "is on host 'b'",
        ),
    ],
)  # fmt: skip
def test_a_topology_that_contradicts_itself_is_refused(change: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        configuration.convert({"model": "flash", **change}, Topology, where="topology.yaml")


def test_the_command_names_every_file_that_is_wrong_and_fails(tmp_path: Path) -> None:
    folder = tmp_path / "h200"
    shutil.copytree(CONFIGS / "h200", folder)
    standalone = folder / "standalone.yaml"
    standalone.write_text(standalone.read_text().replace("max_num_seqs", "max_num_sequences"))
    (folder / "notes.yaml").write_text("a: 1\n")
    command = [sys.executable, "-m", "tools.check_configs", str(folder), str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if "PROBLEM" in line]
    assert any("standalone.yaml" in line and "max_num_sequences" in line for line in wrong)
    assert any("notes.yaml" in line for line in wrong)
    assert any("nowhere is not a folder" in line for line in wrong)
    assert "prefill.yaml" in done.stdout


def test_a_folder_without_a_topology_is_checked_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "router-a.yaml").write_text("server: {port: 1}\n")
    assert check_folder(tmp_path) == ([], [])
    (tmp_path / "router-a.yaml").write_text("server: {port: one}\n")
    _, found = check_folder(tmp_path)
    assert len(found) == 1
    assert "$.server.port" in found[0]


def test_the_one_command_of_a_node_starts_the_deployment_its_topology_describes() -> None:
    cluster = configuration.load(CONFIGS / "h200" / "cluster.yaml", ClusterConfig)
    started = {
        (process.module, process.config, process.env.get("CUDA_VISIBLE_DEVICES", "")) for process in cluster.processes
    }
    topology = load_topology(CONFIGS / "h200")
    assert topology is not None
    described = topology.deployments[0].processes
    assert started == {(place.module, place.config, ",".join(map(str, place.gpus))) for place in described}
